"""Answers a task's questions: in batches sorted by length, split over processes, on disk as soon as they are known."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from transformers_minigpt4.inference.generation import answer_prompts
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image
from transformers_minigpt4.utils.files import to_json

from .evaluator import Question


_LOADING_THREADS = 8


def make_batches(questions: Iterable[Question], batch_size: int) -> list[list[Question]]:
    """
    Batches of equally many pictures a question, the longest prompts first.

    Prompts of like length waste little padding, and a batch that is too large for the memory fails at once.

    Args:
        questions: In any order; the batches do not depend on it.
        batch_size: Questions a batch, at most.

    Raises:
        ValueError: if `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but a batch needs at least one question; set it to 1 or more")
    ordered = sorted(questions, key=lambda question: (-len(question.images), -len(question.prompt), question.id))
    batches = []
    for _, group in groupby(ordered, key=lambda question: len(question.images)):
        rows = list(group)
        batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return batches


def image_digest(image: Any) -> str:
    """
    What tells a picture apart wherever it is stored: name and size of a file, a URL, or a hash of the content.

    Reading every byte of 5,000 photographs before the first question would take longer than it is worth.
    """
    if isinstance(image, Image.Image):
        content = f"{image.mode}{image.size}".encode() + image.tobytes()
        return hashlib.sha256(content).hexdigest()
    if isinstance(image, (bytes, bytearray)):
        return hashlib.sha256(image).hexdigest()
    path = Path(image)
    return f"{path.name}:{path.stat().st_size}" if path.is_file() else str(image)


def question_key(question: Question, generation: Mapping[str, Any], model: str) -> str:
    """What an answer depends on, so that a kept one is used again only where all of this is the same."""
    facts = [question.prompt, [image_digest(image) for image in question.images], dict(generation), model]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class AnswerStore:
    """
    The answers of one task in a folder: finished ones in `TASK.jsonl`, a run's under way in `TASK.part-N.jsonl`.

    Every process appends to a part of its own. A line is whole by itself: `{"id", "key", "answer"}`, or `"error"` in
    place of the answer where a picture cannot be loaded; these questions are asked again by the next run.

    Args:
        folder: Made where it does not exist.
        task: Name of the task.
        process: Number of this process.
    """

    folder: Path
    task: str
    process: int = 0
    _file: BinaryIO | None = field(default=None, repr=False)

    @property
    def finished(self) -> Path:
        return self.folder / f"{self.task}.jsonl"

    @property
    def parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.task}.part-*.jsonl"))

    def read(self) -> dict[str, dict[str, Any]]:
        """
        The last line of each question, by `key`. The end of a part that a kill cut in half is left out.

        Raises:
            ValueError: where a file holds anything but answers.
        """
        lines: dict[str, dict[str, Any]] = {}
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
                            f"line {number} of {str(path)!r} is no answer; remove the file or choose another --output"
                        )
        return lines

    @contextlib.contextmanager
    def writing(self) -> Iterator["AnswerStore"]:
        """Open this process's part for [`append`], cut behind its last whole line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.task}.part-{self.process}.jsonl"
        path.touch()
        with open(path, "r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            self._file = file
            try:
                yield self
            finally:
                self._file = None

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write one batch; it is on the disk when this returns."""
        if self._file is None:
            raise ValueError(f"the answers of {self.task} are not open; append within `writing()`")
        self._file.write(b"".join(to_json(record).encode() + b"\n" for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, records: Iterable[Mapping[str, Any]]) -> None:
        """
        Put `records` (each with `id`, `key` and `answer` or `error`) into `TASK.jsonl`, and remove the parts.

        Answers to questions that are not among them, such as those behind a `--limit`, go to a part of their own, so
        that a later run need not ask again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = list(records)
        used = {row["key"] for row in rows}
        others = [line for key, line in self.read().items() if key not in used and "answer" in line]
        kept = self.folder / f"{self.task}.part-unused.jsonl"
        for path, lines in ((kept, others), (self.finished, rows)):
            if lines:
                scratch = path.with_name(f".{path.name}")
                with scratch.open("w", encoding="utf-8") as file:
                    file.writelines(to_json(line) + "\n" for line in lines)
                os.replace(scratch, path)
        for part in self.parts:
            if part != kept or not others:
                part.unlink()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    keys = ("id", "key")
    return record if isinstance(record, dict) and all(isinstance(record.get(key), str) for key in keys) else None


def answer_batches(
    batches: Sequence[Sequence[Question]], model: Any, processor: Any, generation: Mapping[str, Any]
) -> Iterator[list[dict[str, str]]]:
    """
    Answer batch by batch, while threads load the pictures of the next.

    Args:
        batches: Questions with equally many pictures within a batch.
        model: Any image-text-to-text model with `generate`.
        processor: The model's processor.
        generation: Arguments of `generate`.

    Yields:
        One list a batch: `{"id", "answer"}`, or `{"id", "error"}` for a question one of whose pictures cannot be
        loaded. Whatever else goes wrong raises.
    """
    pool = ThreadPoolExecutor(_LOADING_THREADS, thread_name_prefix="load-image")

    def load(batch: Sequence[Question]) -> list[Any]:
        return [pool.submit(_load_all, question.images) for question in batch]

    try:
        waiting = load(batches[0]) if batches else []
        for number, batch in enumerate(batches):
            loaded = [future.result() for future in waiting]
            waiting = load(batches[number + 1]) if number + 1 < len(batches) else []
            whole = [(q, pictures) for q, pictures in zip(batch, loaded) if isinstance(pictures, list)]
            texts: list[str] = []
            if whole:
                prompts = [question.prompt for question, _ in whole]
                texts = answer_prompts([pictures for _, pictures in whole], prompts, model, processor, **generation)
            answers = {question.id: {"answer": text} for (question, _), text in zip(whole, texts)}
            failed = {q.id: {"error": str(error)} for q, error in zip(batch, loaded) if not isinstance(error, list)}
            yield [{"id": question.id, **(answers | failed)[question.id]} for question in batch]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _load_all(pictures: Sequence[Any]) -> list[Image.Image] | ImageLoadError:
    try:
        return [load_image(image) for image in pictures]
    except ImageLoadError as error:
        return error
