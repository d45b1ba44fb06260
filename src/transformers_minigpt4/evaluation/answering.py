"""Answers a task's questions: in batches sorted by length, split over processes, on disk as soon as they are known."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path

from PIL import Image

from transformers_minigpt4.inference.engines import Engine, Request, answer_items
from transformers_minigpt4.inference.sources import ImageSource
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image
from transformers_minigpt4.utils.files import JsonLinesWriter, JsonObject, atomic_file, to_json

from .evaluator import Question


def make_batches(questions: Iterable[Question], batch_size: int, by_image: bool = False) -> list[list[Question]]:
    """
    Batches of questions with the same number of images, the longest prompts first.

    Prompts of similar length waste little padding, and a batch that is too large for the memory fails at once.

    Args:
        questions: In any order; the batches do not depend on it.
        batch_size: Largest number of questions in a batch.
        by_image: Whether questions about the same images are put together instead, for an engine that pads nothing
            and computes features once for requests about an image that are near each other.

    Raises:
        ValueError: if `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but a batch needs at least one question; set it to 1 or more")

    def order(question: Question) -> tuple[int, list[str], int, str]:
        images = [image_digest(image) for image in question.images] if by_image else []
        return -len(question.images), images, -len(question.prompt), question.id

    ordered = sorted(questions, key=order)
    batches = []
    for _, group in groupby(ordered, key=lambda question: len(question.images)):
        rows = list(group)
        batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return batches


def image_digest(image: ImageSource) -> str:
    """
    What identifies an image wherever it is stored: name and size of a file, a URL, or a hash of the content.

    Reading every byte of 5,000 photos before the first question would take too long.
    """
    if isinstance(image, Image.Image):
        content = f"{image.mode}{image.size}".encode() + image.tobytes()
        return hashlib.sha256(content).hexdigest()
    if isinstance(image, (bytes, bytearray)):
        return hashlib.sha256(image).hexdigest()
    if not isinstance(image, (str, os.PathLike)):
        return str(image)
    path = Path(image)
    return f"{path.name}:{path.stat().st_size}" if path.is_file() else str(image)


def question_key(question: Question, generation: Mapping[str, object], model: str) -> str:
    """Hash of all that an answer depends on; a saved answer is reused only if it is the same."""
    facts = [question.prompt, [image_digest(image) for image in question.images], dict(generation), model]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class AnswerStore:
    """
    The answers of one task in a folder: finished ones in `TASK.jsonl`, those of a running process in
    `TASK.part-N.jsonl`.

    Each process appends to its own part. A line is complete in itself: `{"id", "key", "answer"}`, or `"error"` instead
    of the answer where an image cannot be loaded; the next run asks these questions again.

    Args:
        folder: Created if it does not exist.
        task: Name of the task.
        process: Number of this process.
    """

    folder: Path
    task: str
    process: int = 0
    _part: JsonLinesWriter | None = field(default=None, repr=False)

    @property
    def finished(self) -> Path:
        return self.folder / f"{self.task}.jsonl"

    @property
    def parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.task}.part-*.jsonl"))

    def read(self) -> dict[str, JsonObject]:
        """
        The last line of each question, by `key`. A last line that a kill cut short is ignored.

        Raises:
            ValueError: if a file holds anything but answers.
        """
        lines: dict[str, JsonObject] = {}
        for path in (self.finished, *self.parts):
            if path.is_file():
                for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
                    if not line.endswith(b"\n"):
                        continue
                    record = _parse(line)
                    if record is not None:
                        lines[record["key"]] = record
                    else:
                        raise ValueError(
                            f"line {number} of {str(path)!r} is not an answer; remove the file or choose another "
                            "--output"
                        )
        return lines

    @contextlib.contextmanager
    def writing(self) -> Iterator["AnswerStore"]:
        """Open this process's part for [`append`]."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.task}.part-{self.process}.jsonl"
        # As in `read`, a line without line break does not count, whatever it holds: all processes must see the same.
        with JsonLinesWriter(path, is_cut=lambda line: True) as self._part:
            yield self
        self._part = None

    def append(self, records: Iterable[Mapping[str, object]]) -> None:
        """
        Write one batch; it is on the disk when this returns.

        Raises:
            ValueError: outside of `writing()`.
        """
        if self._part is None:
            raise ValueError(f"the answers of {self.task} are not open; append within `writing()`")
        self._part.append(records)

    def finish(self, records: Iterable[Mapping[str, object]]) -> None:
        """
        Write `records` (each with `id`, `key` and `answer` or `error`) to `TASK.jsonl`, and remove the parts.

        Answers to other questions, such as those cut off by a `--limit`, are kept in a separate part, so that a later
        run need not ask again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = list(records)
        used = {row["key"] for row in rows}
        others = [line for key, line in self.read().items() if key not in used and "answer" in line]
        kept = self.folder / f"{self.task}.part-unused.jsonl"
        contents: tuple[tuple[Path, Sequence[Mapping[str, object]]], ...] = ((kept, others), (self.finished, rows))
        for path, lines in contents:
            if lines:
                with atomic_file(path) as scratch, scratch.open("w", encoding="utf-8") as file:
                    file.writelines(to_json(line) + "\n" for line in lines)
        for part in self.parts:
            if part != kept or not others:
                part.unlink()


def _parse(line: bytes) -> JsonObject | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    keys = ("id", "key")
    return record if isinstance(record, dict) and all(isinstance(record.get(key), str) for key in keys) else None


def answer_batches(
    batches: Sequence[list[Question]], engine: Engine, generation: Mapping[str, object]
) -> Iterator[list[dict[str, str]]]:
    """
    Answer batch by batch, while threads load the images of the next questions.

    Args:
        batches: Questions with the same number of images within a batch.
        engine: Answers.
        generation: Arguments of `generate`.

    Yields:
        One list per batch: `{"id", "answer"}`, or `{"id", "error"}` for a question one of whose images cannot be
        loaded. Any other error is raised.
    """
    answered = answer_items(chain.from_iterable(batches), _request, engine, **generation)
    for batch in batches:
        yield [
            {"id": question.id, "error" if isinstance(answer, ImageLoadError) else "answer": str(answer)}
            for question, answer in islice(answered, len(batch))
        ]


def _request(question: Question) -> Request:
    return Request([load_image(image) for image in question.images], question.prompt)
