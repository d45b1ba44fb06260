"""What an evaluation leaves: `results.json` with metrics, intervals and all that they depend on."""

import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers_minigpt4.utils.file_names import RESULTS_FILE, RUN_FILE

from .answering import image_digest
from .evaluator import GREEDY, Question, Record, Task, columns_of, interval, resampled, write_json


ANSWERS = "answers"  # folder of one JSON Lines file a task
FORMAT = 1

_PACKAGES = (
    *("transformers_minigpt4", "torch", "transformers", "accelerate", "tokenizers", "numpy", "pillow"),
    *("pycocoevalcap", "openai"),
)
_MODEL_FILES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py"}
_NO_MODEL_FILES = {RESULTS_FILE, RUN_FILE, "trainer_state.json"}
_SAMPLE_BYTES = 4096
_SMALL_FILE = 1 << 20


def data_fingerprint(questions: Sequence[Question]) -> str:
    """
    SHA-256 over all questions: ids, prompts, pictures, references and groups, in the order of their ids.

    Pictures in files count by name and size, see [`~answering.picture_digest`], so data may move to another folder.
    """
    digest = hashlib.sha256()
    for question in sorted(questions, key=lambda question: question.id):
        pictures = [image_digest(image) for image in question.images]
        facts = [question.id, question.prompt, pictures, question.reference, dict(question.groups)]
        digest.update(json.dumps(facts, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def checkpoint_fingerprint(folder: Path) -> str:
    """
    SHA-256 over the files of a checkpoint: small ones whole, of weights the name, shape and samples of each tensor.

    4 KiB at the start and in the middle of each tensor: reading 15 GB would take longer than loading them.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in _MODEL_FILES or path.name in _NO_MODEL_FILES:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            if size <= _SMALL_FILE:
                digest.update(file.read())
                continue
            for offset in _sampled_offsets(file, size, path.suffix):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _sampled_offsets(file: Any, size: int, suffix: str) -> list[int]:
    if suffix != ".safetensors":
        return list(range(0, size, max(_SAMPLE_BYTES, size // 4096)))
    start = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(start))
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return [8, *sorted({8 + start + offset for begin, end in spans for offset in (begin, (begin + end) // 2)})]


def environment() -> dict[str, Any]:
    """Versions of the packages that a result depends on, and the commit of this package where it lies in git."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"versions": versions, "git_revision": _git_revision(Path(__file__).parent)}


def _git_revision(folder: Path) -> str | None:
    run = lambda *words: subprocess.run(  # noqa: E731
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        run("ls-files", "--error-unmatch", Path(__file__).name)
        return run("rev-parse", "HEAD") + ("+changes" if run("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def summarise(
    task: Task, questions: Sequence[Question], records: Sequence[Record], *, seed: int = 0
) -> dict[str, Any]:
    """
    One task's metrics with their 95 % bootstrap intervals over questions.

    Args:
        task: Names the metrics.
        questions: All of them.
        records: One each, as [`complete_records`] gives them.
        seed: Of the bootstrap.

    Returns:
        `metrics`, `intervals` (`[low, high]`), `primary`, `higher_is_better`, `units`, `groups`, `samples`, `failures`
        and `without_value`: metrics for which no question gave a number, which are in neither of the first two.
    """
    groups = sorted({group for question in questions for group in question.groups})
    columns = columns_of(records, groups)
    samples = resampled([metric.compute for metric in task.metrics], columns, seed=seed)
    values = {metric.name: float(metric.compute(columns)) for metric in task.metrics}
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    spans = {metric.name: interval(samples[:, i]) for i, metric in enumerate(task.metrics) if metric.name in finite}
    return {
        "metrics": finite,
        "intervals": {name: list(span) for name, span in spans.items() if span is not None},
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
        ValueError: if the task gave another number of records than there are questions.
    """
    if len(records) != len(questions):
        raise ValueError(
            f"the task {task.name} scored {len(records)} of {len(questions)} questions; it must score all"
        )
    return [
        {**record, **question.groups, "id": question.id, "failed": question.id not in answers}
        for question, record in zip(questions, records)
    ]


def describe_task(task: Task, questions: Sequence[Question], data: str, revision: str | None) -> dict[str, Any]:
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


def read_results(folder: Path) -> dict[str, Any]:
    """
    The `results.json` of an evaluation, or of the checkpoint that it stands beside.

    Args:
        folder: The output folder, or the file itself.

    Raises:
        ValueError: where there is none, or it is not of this form.
    """
    path = folder / RESULTS_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise ValueError(f"there is no {str(path)!r}; make it with `minigpt4 evaluate CHECKPOINT --output {folder}`")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); evaluate again") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT or "tasks" not in results:
        raise ValueError(
            f"{str(path)!r} is no results file of `minigpt4 evaluate` in format {FORMAT}; evaluate again into another "
            "--output"
        )
    return results


def check_output(output: Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """
    The tasks that `output` holds already, to be kept beside new ones.

    Raises:
        ValueError: if they are of another checkpoint.
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
    tasks: dict[str, Any] = earlier["tasks"]
    return tasks


def write_results(output: Path, checkpoint: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Write `results.json` in one step; returns what it holds."""
    results = {"format": FORMAT, "checkpoint": dict(checkpoint), "tasks": dict(tasks)}
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RESULTS_FILE, results)
    return results
