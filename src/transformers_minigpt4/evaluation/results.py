"""What an evaluation leaves: `results.json` with metrics, intervals and all that they depend on."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from transformers_minigpt4.modeling.trained_modules_minigpt4 import fingerprint
from transformers_minigpt4.utils.file_names import RESULTS_FILE, RUN_FILE
from transformers_minigpt4.utils.files import write_json
from transformers_minigpt4.utils.json_files import parse_json
from transformers_minigpt4.utils.versions import PACKAGE, git_revision, package_versions

from .answering import image_digest
from .evaluator import GREEDY, Question, Record, Task, columns_of
from .intervals import confidence_interval, counted_rows, resampled


ANSWERS = "answers"  # folder with one JSON Lines file per task
FORMAT = 1

_PACKAGES = (
    *(PACKAGE, "torch", "transformers", "accelerate", "tokenizers", "numpy", "pillow"),
    *("pycocoevalcap", "openai"),
)
_MODEL_FILES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py"}
_NO_MODEL_FILES = {RESULTS_FILE, RUN_FILE, "trainer_state.json"}
_SAMPLE_BYTES, _SAMPLES = 4096, 4096  # of a file that is not safetensors


class CheckpointFacts(TypedDict):
    """What identifies a checkpoint: its commit on the Hub, or a fingerprint of its files."""

    id: str
    revision: str | None
    fingerprint: str
    model_type: str
    dtype: str


class TaskResults(TypedDict, total=False):
    """The results of one task: what they depend on ([`describe_task`]), metrics ([`summarize`]), and the run."""

    paper: str
    dataset: str
    split: str
    revision: str | None
    data: str
    fingerprint: str
    prompts: dict[str, str]
    judge_prompts: dict[str, str]
    generation: dict[str, object]
    metrics: dict[str, float]
    intervals: dict[str, list[float]]
    questions: dict[str, int]
    primary: str
    higher_is_better: dict[str, bool | None]
    units: dict[str, str]
    without_value: list[str]
    groups: list[str]
    samples: int
    failures: int
    answers: str
    run: Mapping[str, object]
    judge: Mapping[str, object]
    notes: list[str]


class Results(TypedDict, total=False):
    """What `results.json` holds."""

    format: int
    checkpoint: CheckpointFacts
    tasks: dict[str, TaskResults]


def data_fingerprint(questions: Sequence[Question]) -> str:
    """
    SHA-256 over all questions: ids, prompts, images, references and groups, in the order of their ids.

    Images in files count by name and size, see [`~answering.image_digest`], so the data may move to another folder.
    """
    digest = hashlib.sha256()
    for question in sorted(questions, key=lambda question: question.id):
        images = [image_digest(image) for image in question.images]
        facts = [question.id, question.prompt, images, question.reference, dict(question.groups)]
        digest.update(json.dumps(facts, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def checkpoint_fingerprint(folder: Path) -> str:
    """SHA-256 over the files of a checkpoint: small ones completely, weights by samples (see [`fingerprint`])."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _MODEL_FILES)
    weights = [path for path in files if path.suffix == ".safetensors"]
    digest = hashlib.sha256(fingerprint(weights).encode())
    for path in files:
        if path in weights or path.name in _NO_MODEL_FILES:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def environment() -> dict[str, object]:
    """Versions of the packages that a result depends on, and the commit of this package if git tracks it."""
    return {"versions": package_versions(_PACKAGES), "git_revision": git_revision(tracked=Path(__file__))}


def summarize(task: Task, questions: Sequence[Question], records: Sequence[Record], *, seed: int = 0) -> TaskResults:
    """
    One task's metrics with their 95 % intervals over questions, see [`~intervals.confidence_interval`].

    Args:
        task: Defines the metrics.
        questions: All of them.
        records: One each, as returned by [`complete_records`].
        seed: Seed of the bootstrap.

    Returns:
        `metrics`, `intervals` (`[low, high]`), `questions` (how many each metric counts), `primary`,
        `higher_is_better`, `units`, `groups`, `samples`, `failures` and `without_value`: metrics for which no question
        gave a number, which neither of the first two contains.
    """
    groups = sorted({group for question in questions for group in question.groups})
    columns = columns_of(records, groups)
    samples = resampled([metric.compute for metric in task.metrics], columns, seed=seed)
    values = {metric.name: float(metric.compute(columns)) for metric in task.metrics}
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    spans = {
        metric.name: confidence_interval(metric, columns, samples[:, i])
        for i, metric in enumerate(task.metrics)
        if metric.name in finite
    }
    return {
        "metrics": finite,
        "intervals": {name: list(span) for name, span in spans.items() if span is not None},
        "questions": {metric.name: counted_rows(metric.compute, columns) for metric in task.metrics},
        "primary": task.primary,
        "higher_is_better": {metric.name: metric.higher_is_better for metric in task.metrics},
        "units": {metric.name: metric.unit for metric in task.metrics},
        "without_value": [name for name in values if name not in finite],
        "groups": groups,
        "samples": len(questions),
        "failures": sum(bool(record["failed"]) for record in records),
    }


def complete_records(
    task: Task, questions: Sequence[Question], records: Sequence[Record], answers: Mapping[str, str]
) -> list[Record]:
    """
    A task's records with `id`, `failed` and the question's groups.

    Raises:
        ValueError: if the task returned more or fewer records than there are questions.
    """
    if len(records) != len(questions):
        raise ValueError(
            f"the task {task.name} scored {len(records)} of {len(questions)} questions; it must score all"
        )
    return [
        {**record, **question.groups, "id": question.id, "failed": question.id not in answers}
        for question, record in zip(questions, records)
    ]


def describe_task(task: Task, questions: Sequence[Question], data: str, revision: str | None) -> TaskResults:
    """What a task's numbers depend on, apart from the model: prompts, arguments of `generate`, and data."""
    return {
        "paper": task.paper,
        "dataset": task.dataset,
        "split": task.split,
        "revision": revision,
        "data": data,
        "fingerprint": data_fingerprint(questions),
        "prompts": dict(task.prompts),
        "judge_prompts": dict(task.judge_prompts),
        "generation": {**GREEDY, **task.generation},
    }


def read_results(folder: Path) -> Results:
    """
    The `results.json` of an evaluation.

    Args:
        folder: The output folder, which may be the checkpoint's own, or the file itself.

    Raises:
        ValueError: if there is none, or it has another format.
    """
    path = folder / RESULTS_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise ValueError(f"there is no {str(path)!r}; create it with `minigpt4 evaluate CHECKPOINT --output {folder}`")
    try:
        results: Results = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); evaluate again") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT or "tasks" not in results:
        raise ValueError(
            f"{str(path)!r} is not a results file of `minigpt4 evaluate` in format {FORMAT}; evaluate again into "
            "another --output"
        )
    return results


def check_output(output: Path, checkpoint: CheckpointFacts) -> dict[str, TaskResults]:
    """
    The tasks that `output` already holds, to be kept next to new ones.

    Raises:
        ValueError: if they are results of another checkpoint.
    """
    path = output / RESULTS_FILE
    if not path.is_file():
        return {}
    earlier = read_results(output)
    if earlier["checkpoint"]["fingerprint"] != checkpoint["fingerprint"]:
        mine, theirs = (
            f"{facts['id']}, fingerprint {facts['fingerprint']}" for facts in (checkpoint, earlier["checkpoint"])
        )
        raise ValueError(
            f"{str(path)!r} holds results of another checkpoint ({theirs}), not of this one ({mine}); choose another "
            "--output, or remove it"
        )
    return earlier["tasks"]


def write_results(output: Path, checkpoint: CheckpointFacts, tasks: Mapping[str, TaskResults]) -> Results:
    """Write `results.json` in one step; returns its content."""
    results: Results = {"format": FORMAT, "checkpoint": checkpoint, "tasks": dict(tasks)}
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RESULTS_FILE, results)
    return results
