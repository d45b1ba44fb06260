"""The file of captions that `describe` appends to: resumed by a later run, and written by one at a time."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from transformers_minigpt4.inference.sources import is_url
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image
from transformers_minigpt4.utils.files import JsonLinesWriter, PathLike, file_lock, to_json, write_atomically

from .images import Description
from .sinks import caption_record


class CaptionFile:
    """
    An append-only JSON Lines file of captions that a later run resumes.

    Each line is complete in itself, `{"image": ..., "caption": ..., "prompt": ..., "model": ...}`, and on the disk
    when [`write`] returns. Images that failed are in a second file, `NAME.failed`, so that a later run can tell a
    new failure from one that has been reported; it tries them again.

    Args:
        path (`str` or `os.PathLike`): the file; created with its folder if it does not exist.
        prompt (`str`): this run's prompt.
        model (`str`): this run's model.

    Raises:
        ValueError: on entry, if the file holds captions of another model or prompt, or anything but captions.
        InUseError: on entry, if another run writes to the file.
        OSError: on entry, if the file cannot be opened for reading and writing.
    """

    def __init__(self, path: PathLike, prompt: str, model: str) -> None:
        self.path, self.prompt, self.model = Path(path), prompt, model
        self.failures = self.path.with_name(f"{self.path.name}.failed")
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self._lines = JsonLinesWriter(path, self._read_back, _is_cut_record)
        self._open = ExitStack()

    def __enter__(self) -> "CaptionFile":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"cannot write {str(self.path)!r}: {str(self.path.parent)!r} is not a folder; choose another --output"
            ) from error
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"cannot write {str(self.path)!r}: it is not a regular file; choose another --output")
        with ExitStack() as stack:
            stack.enter_context(
                file_lock(
                    self.path,
                    f"another run ({{owner}}) writes to {str(self.path)!r}; wait for it, or choose another --output",
                )
            )
            self.failed = _read_failures(self.failures)
            stack.enter_context(self._lines)
            self._recorded = dict(self.failed)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._open:
            failed = {image: error for image, error in self.failed.items() if image not in self.done}
            if failed != self._recorded:
                lines = [to_json({"image": image, "error": error}) + "\n" for image, error in failed.items()]
                write_atomically(self.failures, "".join(lines))
            if not failed:
                self.failures.unlink(missing_ok=True)

    def remaining(self, sources: Iterable[str]) -> tuple[list[str], int]:
        """
        What is left to describe of a list of images, and how many of it failed in an earlier run and still do.

        Only what failed before is read here.
        """
        left = [source for source in sources if source not in self.done]
        still = {source for source in left if source in self.failed and not _can_be_read(source)}
        return [source for source in left if source not in still], len(still)

    def write(self, one: Description) -> None:
        """
        Write what became of an image: a caption, which is on the disk when this returns, or an error.

        A download may work in the next run, so its error is not kept.
        """
        if one.error is None:
            self._lines.append([caption_record(one, self.prompt, self.model)])
            self.done.add(one.image.key)
        elif not is_url(one.image.key):
            self.failed[one.image.key] = one.error

    def _read_back(self, number: int, line: bytes) -> None:
        """Note the image of a finished line."""
        record = _parse(line)
        if record is None:
            raise ValueError(f"line {number} of {str(self.path)!r} is not a caption record; choose another --output")
        for key, mine in (("model", self.model), ("prompt", self.prompt)):
            if record[key] != mine:
                raise ValueError(
                    f"{str(self.path)!r} was made with {key} {record[key]!r}, but this run has {key} {mine!r}; "
                    "use the same or choose another --output"
                )
        self.done.add(record["image"])


def _can_be_read(source: str) -> bool:
    try:
        load_image(source)
    except ImageLoadError:
        return False
    return True


def _read_failures(path: Path) -> dict[str, str]:
    """
    Raises:
        ValueError: for a file that is something else.
    """
    if not path.is_file():
        return {}
    try:
        with open(path, encoding="utf-8") as file:  # whose lines end at line feeds only, unlike those of `splitlines`
            records = [json.loads(line) for line in file]
        return {str(record["image"]): str(record["error"]) for record in records}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a list of failed images; rename or remove it") from error


def _parse(line: bytes) -> dict[str, str] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    keys = ("image", "caption", "prompt", "model")
    return record if isinstance(record, dict) and all(isinstance(record.get(key), str) for key in keys) else None


def _is_cut_record(line: bytes) -> bool:
    """Whether a line can be the beginning of a record, so that dropping it cannot destroy somebody else's text."""
    start = b'{"image": "'
    return _parse(line) is None and (line.startswith(start) or start.startswith(line))
