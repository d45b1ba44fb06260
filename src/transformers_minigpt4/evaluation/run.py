"""Runs tasks on a checkpoint of any image-text-to-text family: asks, scores, and writes the results."""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from transformers_minigpt4.inference.loading import load_model_and_processor
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image

from .answering import AnswerStore, answer_batches, image_digest, make_batches, question_key
from .evaluator import GREEDY, Question, Task
from .results import (
    ANSWERS,
    check_output,
    checkpoint_fingerprint,
    complete_records,
    describe_task,
    environment,
    summarise,
    write_results,
)
from .tasks import load_task


if TYPE_CHECKING:
    from transformers_minigpt4.llm.client import ChatModel
    from transformers_minigpt4.llm.types import ChatSettings


HUB = "hub:"  # data sets on the Hub, as hub:namespace/name[@revision]
JUDGE_CACHE = "judge.sqlite"
_COPY = 384  # pixels of the longer side of a kept picture
_WAIT = timedelta(hours=12)  # a process that has finished waits so long for the others


def evaluate(
    checkpoint: str,
    tasks: Sequence[str | Task],
    data: str | Path | Mapping[str, str | Path],
    output: str | Path,
    *,
    judge: "ChatSettings | ChatModel | None" = None,
    judge_cache: str | Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Ask a model all questions of some tasks, score its answers and write `output/results.json`.

    Under `accelerate launch` or `torchrun` the questions are split over the processes; the first one scores. A run
    that was stopped goes on where it was: answers are on the disk batch by batch, and an answer is used again where
    question, pictures, arguments of `generate` and checkpoint are the same.

    Args:
        checkpoint: Folder or Hub id of an image-text-to-text model of any family, with its processor.
        tasks: Names of `tasks.TASKS`, or tasks themselves.
        data: Where the official files are. A folder: `data/TASK` is taken where it exists, else `data` itself. Or a
            path for each task. `"hub:namespace/name@revision"` is a data set of the Hub.
        output: Folder for `results.json` and `answers/TASK.jsonl`; what it holds of other tasks stays.
        judge: Settings of a chat model, or one that is open, for the tasks that ask one.
        judge_cache: Where the judge's replies are kept; by default `output/judge.sqlite`.
        batch_size: Questions that go through the model at once.
        limit: Questions of each task, the first ones; all by default.
        dtype, device, trust_remote_code: As of [`~describe.load_model_and_processor`].
        seed: Of the bootstrap intervals.

    Returns:
        What `results.json` holds. On a process other than the first: an empty mapping.

    Raises:
        ValueError: for an unknown task, missing or wrong data, duplicate ids, a checkpoint that cannot be evaluated,
            or an output of another checkpoint. All but the last words of a checkpoint are found before it is loaded.
    """
    from accelerate import PartialState

    chosen = [load_task(task) if isinstance(task, str) else task for task in tasks]
    _check_request(chosen, judge, limit)
    output = Path(output)
    loaded = [(task, *load_questions(task, data, limit)) for task in chosen]
    facts = checkpoint_facts(checkpoint, dtype, trust_remote_code)
    earlier = check_output(output, facts)
    # accelerate joins processes without an accelerator only when told that they run on the CPU.
    on_cpu = device == "cpu" or torch.accelerator.current_accelerator(check_available=True) is None
    state = PartialState(cpu=on_cpu, timeout=_WAIT)
    if device is None and state.num_processes > 1:
        device = str(state.device)
    model = _LazyModel(checkpoint, dtype, device, trust_remote_code)
    stores = [AnswerStore(output / ANSWERS, task.name, state.process_index) for task in chosen]
    seconds = []
    for (task, questions, _), store in zip(loaded, stores):
        start = time.perf_counter()
        _ask(task, questions, store, model, facts, batch_size, state)
        seconds.append(time.perf_counter() - start)
    state.wait_for_everyone()
    if not state.is_main_process:
        return {}
    done = dict(earlier)
    surroundings = {**environment(), **model.placement, "processes": state.num_processes}
    with _open_judge(judge, judge_cache or output / JUDGE_CACHE, chosen) as open_judge:
        for (task, questions, source), store, spent in zip(loaded, stores, seconds):
            entry = describe_task(task, questions, *source)
            entry |= _score(task, questions, store, facts, open_judge, seed)
            entry["run"] = {**surroundings, "seconds": round(spent, 2), "batch_size": batch_size, "limit": limit}
            if open_judge is not None and task.judge_prompts:
                entry["judge"] = {"model": open_judge.name, **asdict(open_judge.usage)}
            done[task.name] = entry
            results = write_results(output, facts, done)
    return results


def _check_request(tasks: Sequence[Task], judge: Any, limit: int | None) -> None:
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


def load_questions(
    task: Task, data: str | Path | Mapping[str, str | Path], limit: int | None = None
) -> tuple[list[Question], tuple[str, str | None]]:
    """
    A task's questions, and the name and the Hub revision of where they are from.

    Raises:
        ValueError: where the data is missing or wrong, holds no question, or one id twice.
    """
    path, name, revision = _find_data(task.name, data)
    questions = task.questions(path, limit)
    if not questions:
        raise ValueError(f"{str(path)!r} holds no question for the task {task.name!r}; check the path")
    twice = [id_ for id_, count in Counter(question.id for question in questions).items() if count > 1]
    if twice:
        raise ValueError(
            f"{str(path)!r} holds the id {twice[0]!r} twice for the task {task.name!r} ({len(twice)} such ids); fetch "
            "the official file again"
        )
    return questions, (name, revision)


def _find_data(task: str, data: str | Path | Mapping[str, str | Path]) -> tuple[Path, str, str | None]:
    if isinstance(data, Mapping):
        if task not in data:
            raise ValueError(f"no data is named for the task {task!r}; give --data {task}=PATH or --data FOLDER")
        source = data[task]
    else:
        source = data
    if str(source).startswith(HUB):
        return _download(*str(source).removeprefix(HUB).partition("@")[::2])
    path = Path(source)
    if not isinstance(data, Mapping) and (path / task).exists():
        path = path / task
    if not path.exists():
        raise ValueError(f"there is no data for the task {task!r} at {str(path)!r}; check --data")
    return path, path.name, None


def _download(name: str, revision: str) -> tuple[Path, str, str]:
    import huggingface_hub

    try:
        path = Path(huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision or None))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"cannot get the data set {name!r} from the Hub: {reason}; check name and revision, or log in with "
            "`hf auth login`"
        ) from error
    return path, name, path.name  # a snapshot's folder is called by its commit


def checkpoint_facts(checkpoint: str, dtype: str = "auto", trust_remote_code: bool = False) -> dict[str, Any]:
    """
    What tells a checkpoint apart: its commit on the Hub, or a fingerprint of its files; loads its config alone.

    Raises:
        ValueError: where there is no such checkpoint.
    """
    from transformers import AutoConfig

    folder = Path(checkpoint)
    local = folder.is_dir()
    if not local and (folder.is_absolute() or checkpoint.startswith(".")):
        raise ValueError(f"there is no model folder {checkpoint!r}; check the path")
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"cannot read the config of {checkpoint!r}: {reason}; give a folder or Hub id") from error
    commit = None if local else getattr(config, "_commit_hash", None)
    return {
        # The rest of a path tells of somebody's computer, and this file may be published.
        "id": folder.resolve().name if local else checkpoint,
        "revision": commit,
        "fingerprint": checkpoint_fingerprint(folder) if local else f"{checkpoint}@{commit}",
        "model_type": config.model_type,
        "dtype": dtype,
    }


class _LazyModel:
    """Loads model and processor when the first question is asked: a run that only scores again needs neither."""

    def __init__(self, checkpoint: str, dtype: str, device: str | None, trust_remote_code: bool):
        self.arguments = (checkpoint, dtype, device, trust_remote_code)
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self) -> tuple[Any, Any]:
        if self._loaded is None:
            model, processor = load_model_and_processor(*self.arguments)
            # AutoProcessor hands out a bare tokenizer or image processor where a folder holds nothing else.
            if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
                raise ValueError(
                    f"{self.arguments[0]!r} has no processor (found only {type(processor).__name__}); save the "
                    "model's processor beside it with processor.save_pretrained"
                )
            self._loaded = model, processor
        return self._loaded

    @property
    def placement(self) -> dict[str, str | None]:
        """Device and dtype of the model; without values where a run needed none, since all answers were kept."""
        if self._loaded is None:
            return {"device": None, "dtype": None}
        return {"device": str(self._loaded[0].device), "dtype": str(self._loaded[0].dtype)}


def _generation(task: Task) -> dict[str, Any]:
    return {**GREEDY, **task.generation}


def _keys(task: Task, questions: Sequence[Question], facts: Mapping[str, Any]) -> dict[str, str]:
    model = f"{facts['fingerprint']} {facts['dtype']}"
    return {question.id: question_key(question, _generation(task), model) for question in questions}


def _ask(
    task: Task,
    questions: Sequence[Question],
    store: AnswerStore,
    model: _LazyModel,
    facts: Mapping[str, Any],
    batch_size: int,
    state: Any,
) -> None:
    """Answer this process's share of what is not answered yet."""
    from tqdm.auto import tqdm

    keys = _keys(task, questions, facts)
    with store.writing():
        answered = {key for key, line in store.read().items() if "answer" in line}
        # No process may add to its part before every other one has read all parts: all must split the same list.
        state.wait_for_everyone()
        # Of questions that are the same but for their id (POPE's three sets share theirs), one is asked.
        asked = {keys[q.id]: q for q in questions if keys[q.id] not in answered}
        batches = make_batches(asked.values(), batch_size)
        mine = batches[state.process_index :: state.num_processes]
        if not mine:
            return
        loaded = model()
        total = sum(map(len, mine))
        # disable=None: no bar where stderr is a file.
        hidden = None if state.is_main_process else True
        with tqdm(total=total, unit="question", desc=task.name, file=sys.stderr, disable=hidden) as bar:
            for records in answer_batches(mine, *loaded, _generation(task)):
                store.append([{**record, "key": keys[record["id"]]} for record in records])
                bar.update(len(records))


def _score(
    task: Task,
    questions: Sequence[Question],
    store: AnswerStore,
    facts: Mapping[str, Any],
    judge: "ChatModel | None",
    seed: int,
) -> dict[str, Any]:
    keys, lines = _keys(task, questions, facts), store.read()
    lost = [question.id for question in questions if keys[question.id] not in lines]
    if lost:
        raise ValueError(
            f"{len(lost)} questions of {task.name} have no answer in {str(store.folder)!r}, such as {lost[0]!r}; all "
            "processes must write into one shared folder"
        )
    kept = {question.id: lines[keys[question.id]] for question in questions}
    answers = {id_: line["answer"] for id_, line in kept.items() if "answer" in line}
    records = complete_records(task, questions, task.score(questions, answers, judge), answers)
    store.finish(
        {
            "id": question.id,
            "key": keys[question.id],
            "prompt": question.prompt,
            "images": [_kept_image(image, store.folder) for image in question.images],
            "reference": question.reference,
            **{name: kept[question.id][name] for name in ("answer", "error") if name in kept[question.id]},
            "record": record,
        }
        for question, record in zip(questions, records)
    )
    return {**summarise(task, questions, records, seed=seed), "answers": f"{ANSWERS}/{store.finished.name}"}


def _kept_image(image: Any, folder: Path) -> str:
    """Where a picture is found later: its path or URL, or a small copy of one that came as bytes or image."""
    if isinstance(image, (str, Path)):
        return os.path.abspath(image) if os.path.exists(image) else str(image)
    name = f"images/{image_digest(image)[:16]}.jpg"
    if not (folder / name).exists():
        try:
            copy = load_image(image).copy()
        except ImageLoadError:
            return f"<{type(image).__name__}>"  # its question has failed for this very reason
        (folder / "images").mkdir(parents=True, exist_ok=True)
        copy.thumbnail((_COPY, _COPY))
        copy.save(folder / name, quality=85)
    return name


@contextlib.contextmanager
def _open_judge(judge: Any, cache: str | Path, tasks: Sequence[Task]) -> Iterator["ChatModel | None"]:
    """The judge where a task asks one; closed here if it was opened here."""
    from transformers_minigpt4.llm.opening import open_chat_model
    from transformers_minigpt4.llm.types import ChatSettings

    if not isinstance(judge, ChatSettings):
        yield judge
        return
    with open_chat_model(judge, cache=Path(cache)) as opened:
        yield opened
