"""Runs tasks on a checkpoint of any image-text-to-text family: asks, scores, and writes the results."""

import contextlib
import copy
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoConfig

from transformers_minigpt4.inference.engines import DEFAULT_BATCH_SIZE, Engine, EngineName
from transformers_minigpt4.inference.loading import load_engine
from transformers_minigpt4.inference.sources import ImageSource
from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.llm.opening import open_chat_model
from transformers_minigpt4.llm.types import ChatSettings
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image
from transformers_minigpt4.utils.checkpoint_files import loading_from
from transformers_minigpt4.utils.models import check_is_folder
from transformers_minigpt4.utils.text import first_line

from .answering import AnswerStore, answer_batches, image_digest, make_batches, question_key
from .evaluator import GREEDY, Question, Task
from .questions import DataSources, load_questions
from .results import (
    ANSWERS,
    CheckpointFacts,
    Results,
    TaskResults,
    check_output,
    checkpoint_fingerprint,
    complete_records,
    describe_task,
    environment,
    summarize,
    write_results,
)
from .tasks import load_task


JUDGE_CACHE = "judge.sqlite"
_COPY = 384  # pixels of the longer side of a saved copy of an image
_WAIT = timedelta(hours=12)  # how long a process that has finished waits for the others


@dataclass
class _Job:
    """One task of a run: its questions with the keys of their answers, where the data is from, and the time spent."""

    task: Task
    questions: list[Question]
    source: tuple[str, str | None]
    keys: dict[str, str]
    store: AnswerStore
    seconds: float = 0.0


def evaluate(
    checkpoint: str,
    tasks: Sequence[str | Task],
    data: DataSources,
    output: str | Path,
    *,
    judge: ChatSettings | ChatModel | None = None,
    judge_cache: str | Path | None = None,
    engine: EngineName = "transformers",
    batch_size: int | None = None,
    limit: int | None = None,
    max_new_tokens: int | Mapping[str, int] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Results:
    """
    Ask a model all questions of some tasks, score its answers and write `output/results.json`.

    Under `accelerate launch` or `torchrun` the questions are split over the processes; the first one scores. An
    interrupted run is resumed: answers are on the disk batch by batch, and an answer is reused where question, images,
    arguments of `generate` and checkpoint are the same.

    Args:
        checkpoint: Folder or Hub id of an image-text-to-text model of any family, with its processor.
        tasks: Names from `tasks.TASKS`, or tasks themselves.
        data: Where the official files are. A folder: `data/TASK` if that exists, else `data` itself. Or a path for
            each task. `"hub:namespace/name@revision"` is a dataset of the Hub.
        output: Folder for `results.json` and `answers/TASK.jsonl`; results of other tasks in it are kept.
        judge: Settings of a chat model, or an open one, for the tasks that need one.
        judge_cache: Cache of the judge's replies; by default `output/judge.sqlite`.
        engine: What runs the model, `"transformers"` or `"vllm"`.
        batch_size: Questions that go through the model at once; 8 by default, with vLLM as many as it chooses.
        limit: Questions of each task, the first ones; all by default.
        max_new_tokens: Longest answer, of every task or by a task's name; by default the tasks' own.
        dtype, device, trust_remote_code: As of [`~inference.loading.load_engine`].
        seed: Seed of the bootstrap intervals.

    Returns:
        What `results.json` holds. On a process other than the first: an empty mapping.

    Raises:
        ValueError: for an unknown task, missing or wrong data, duplicate ids, a checkpoint that cannot be evaluated,
            or an output of another checkpoint. All but a missing processor are found before the model is loaded.
    """
    chosen = [load_task(task) if isinstance(task, str) else task for task in tasks]
    _check_request(chosen, judge, limit)
    together = DEFAULT_BATCH_SIZE if batch_size is None else batch_size  # of which answers are written together
    chosen = _with_lengths(chosen, max_new_tokens)
    output = Path(output)
    loaded = [(task, *load_questions(task, data, limit)) for task in chosen]
    facts = checkpoint_facts(checkpoint, dtype, trust_remote_code)
    earlier = check_output(output, facts)
    # accelerate joins processes without an accelerator only when told that they run on the CPU.
    on_cpu = device == "cpu" or torch.accelerator.current_accelerator(check_available=True) is None
    state = PartialState(cpu=on_cpu, timeout=_WAIT)
    if engine == "vllm" and state.num_processes > 1:
        raise ValueError(
            "the engine vllm shares the work among GPUs by itself; start the command without accelerate or torchrun, "
            "and give --device auto"
        )
    if device is None and state.num_processes > 1:
        device = str(state.device)
    lazy = _LazyEngine(
        engine,
        checkpoint,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        images_per_prompt=max(
            (len(question.images) for _, questions, _ in loaded for question in questions), default=1
        ),
    )
    jobs = [
        _Job(
            task,
            questions,
            source,
            _keys(task, questions, facts, engine),
            AnswerStore(output / ANSWERS, task.name, state.process_index),
        )
        for task, questions, source in loaded
    ]
    for job in jobs:
        start = time.perf_counter()
        _ask(job, lazy, together, state)
        job.seconds = time.perf_counter() - start
    state.wait_for_everyone()
    if not state.is_main_process:
        return {}
    run: dict[str, object] = {**environment(), "engine": engine, **lazy.placement, "processes": state.num_processes}
    run |= {"batch_size": batch_size if engine == "vllm" else together, "limit": limit}
    results: Results = {}
    with _open_judge(judge, judge_cache or output / JUDGE_CACHE) as open_judge:
        for job in jobs:
            entry = _score(job, open_judge, seed)
            entry["run"] = {**run, "seconds": round(job.seconds, 2)}
            results = write_results(output, facts, {**earlier, **results.get("tasks", {}), job.task.name: entry})
    return results


def _check_request(tasks: Sequence[Task], judge: ChatSettings | ChatModel | None, limit: int | None) -> None:
    if not tasks:
        raise ValueError("no task is named; give --tasks, such as gqa,chair (--list-tasks shows all)")
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if twice:
        raise ValueError(f"the task {twice[0]!r} is named twice; name each once")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, but a task needs at least one question; leave it out for all")
    for task in tasks:
        if task.needs_judge and judge is None:
            raise ValueError(
                f"the task {task.name!r} needs a judge; give --judge MODEL, with --judge-url for one behind an "
                "OpenAI-compatible endpoint"
            )


def _with_lengths(tasks: Sequence[Task], lengths: int | Mapping[str, int] | None) -> list[Task]:
    """The tasks, with other longest answers where these are given."""
    chosen = list(tasks)
    if lengths is None:
        return chosen
    names = [task.name for task in chosen]
    by_name = dict.fromkeys(names, lengths) if isinstance(lengths, int) else dict(lengths)
    for name, length in by_name.items():
        if name not in names:
            raise ValueError(f"max_new_tokens names {name!r}, which is not among the tasks {', '.join(names)}")
        if length < 1:
            raise ValueError(f"max_new_tokens of {name} is {length}; an answer needs at least one")
        task = chosen[names.index(name)] = copy.copy(chosen[names.index(name)])
        task.generation = {**task.generation, "max_new_tokens": length}
    return chosen


def checkpoint_facts(checkpoint: str, dtype: str = "auto", trust_remote_code: bool = False) -> CheckpointFacts:
    """
    What identifies a checkpoint; loads only its config.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    check_is_folder(checkpoint)
    folder = Path(checkpoint)
    local = folder.is_dir()
    try:
        with loading_from(checkpoint):
            config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read the config of {checkpoint!r}: {first_line(error)}; give a folder or Hub id"
        ) from error
    commit = None if local else getattr(config, "_commit_hash", None)
    return {
        # The rest of a path is private, and this file may be published.
        "id": folder.resolve().name if local else checkpoint,
        "revision": commit,
        "fingerprint": checkpoint_fingerprint(folder) if local else f"{checkpoint}@{commit}",
        "model_type": config.model_type,
        "dtype": dtype,
    }


class _LazyEngine:
    """Loads the model when the first question is asked: a run that only scores again does not need it."""

    def __init__(self, name: EngineName, checkpoint: str, **options: Any) -> None:
        self.name, self.checkpoint, self.options = name, checkpoint, options
        self._loaded: Engine | None = None

    def __call__(self) -> Engine:
        if self._loaded is None:
            engine = load_engine(self.name, self.checkpoint, **self.options)
            # AutoProcessor returns a bare tokenizer or image processor if a folder holds nothing else.
            processor = engine.processor
            if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
                raise ValueError(
                    f"{self.checkpoint!r} has no processor (found only {type(processor).__name__}); save the "
                    "model's processor in its folder with processor.save_pretrained"
                )
            self._loaded = engine
        return self._loaded

    @property
    def placement(self) -> dict[str, str | None]:
        """Device and dtype of the model; without values if the run did not load it, since all answers were saved."""
        if self._loaded is None:
            return {"device": None, "dtype": None}
        return {"device": self._loaded.device, "dtype": self._loaded.dtype}


def _keys(task: Task, questions: Sequence[Question], facts: CheckpointFacts, engine: EngineName) -> dict[str, str]:
    # Rounding differs between engines.
    model = f"{facts['fingerprint']} {facts['dtype']}" + (f" {engine}" if engine != "transformers" else "")
    return {question.id: question_key(question, _generation(task), model) for question in questions}


def _generation(task: Task) -> dict[str, object]:
    return {**GREEDY, **task.generation}


def _ask(job: _Job, engine: _LazyEngine, batch_size: int, state: PartialState) -> None:
    """Answer this process's share of the questions without an answer."""
    with job.store.writing():
        answered = {key for key, line in job.store.read().items() if "answer" in line}
        # No process may add to its part before every other one has read all parts: all must split the same list.
        state.wait_for_everyone()
        # Of questions that differ only in their id (POPE's three sets share theirs), one is asked.
        asked = {job.keys[q.id]: q for q in job.questions if job.keys[q.id] not in answered}
        batches = make_batches(asked.values(), batch_size, by_image=engine.name == "vllm")
        mine = batches[state.process_index :: state.num_processes]
        if not mine:
            return
        loaded = engine()
        total = sum(map(len, mine))
        # disable=None: no bar where stderr is a file.
        hidden = None if state.is_main_process else True
        with tqdm(total=total, unit="question", desc=job.task.name, file=sys.stderr, disable=hidden) as bar:
            for records in answer_batches(mine, loaded, _generation(job.task)):
                job.store.append([{**record, "key": job.keys[record["id"]]} for record in records])
                bar.update(len(records))


def _score(job: _Job, judge: ChatModel | None, seed: int) -> TaskResults:
    """Score the answers of a task, and write them with their records."""
    task, questions, keys, store = job.task, job.questions, job.keys, job.store
    lines = store.read()
    lost = [question.id for question in questions if keys[question.id] not in lines]
    if lost:
        raise ValueError(
            f"{len(lost)} questions of {task.name} have no answer in {str(store.folder)!r}, such as {lost[0]!r}; all "
            "processes must write into one shared folder"
        )
    found = {question.id: lines[keys[question.id]] for question in questions}
    answers = {id_: line["answer"] for id_, line in found.items() if "answer" in line}
    with _at_temperature_of(task, judge):
        records = complete_records(task, questions, task.score(questions, answers, judge), answers)
    store.finish(
        {
            "id": question.id,
            "key": keys[question.id],
            "prompt": question.prompt,
            "images": [_kept_image(image, store.folder) for image in question.images],
            "reference": question.reference,
            **{name: found[question.id][name] for name in ("answer", "error") if name in found[question.id]},
            "record": record,
        }
        for question, record in zip(questions, records)
    )
    entry = describe_task(task, questions, *job.source) | summarize(task, questions, records, seed=seed)
    entry["answers"] = f"{ANSWERS}/{store.finished.name}"
    if judge is not None and task.judge_prompts:
        settings = judge.settings
        temperature = settings.temperature if task.judge_temperature is None else task.judge_temperature
        decoding = {"temperature": temperature, "max_tokens": settings.max_tokens}
        entry["judge"] = {"model": judge.name, **decoding, **asdict(judge.usage)}
        entry["notes"] = list(task.notes)
    return entry


def _at_temperature_of(task: Task, judge: ChatModel | None) -> contextlib.AbstractContextManager[None]:
    if judge is None or task.judge_temperature is None:
        return contextlib.nullcontext()
    return judge.at_temperature(task.judge_temperature)


def _kept_image(image: ImageSource, folder: Path) -> str:
    """Where to find an image later: its path or URL, or a small copy of one that came as bytes or PIL image."""
    if isinstance(image, (str, Path)):
        return os.path.abspath(image) if os.path.exists(image) else str(image)
    name = f"images/{image_digest(image)[:16]}.jpg"
    if not (folder / name).exists():
        try:
            copy = load_image(image).copy()
        except ImageLoadError:
            return f"<{type(image).__name__}>"  # which is why its question has failed
        (folder / "images").mkdir(parents=True, exist_ok=True)
        copy.thumbnail((_COPY, _COPY))
        copy.save(folder / name, quality=85)
    return name


@contextlib.contextmanager
def _open_judge(judge: ChatSettings | ChatModel | None, cache: str | Path) -> Iterator[ChatModel | None]:
    """The judge; closed in the end if it was opened here."""
    if not isinstance(judge, ChatSettings):
        yield judge
        return
    with open_chat_model(judge, cache=Path(cache)) as opened:
        yield opened
