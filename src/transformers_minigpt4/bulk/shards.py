"""
Captions of many images as a folder of shards: one output file per shard of images, resumed, and shared by processes.

A shard of images becomes one file of captions, which appears under its name when it is complete. Whoever finds the
file leaves the shard alone; so a second run does what is missing, and any number of processes on any number of
machines that see the folder can work on it at once.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from transformers_minigpt4.utils.disk_full import is_disk_full
from transformers_minigpt4.utils.files import (
    LOCK_FILE,
    InUseError,
    PathLike,
    file_lock,
    remove_leftovers,
    write_atomically,
    write_json,
)
from transformers_minigpt4.utils.text import first_line


# Hidden, like all other files in the folder but the captions, so that `datasets.load_dataset` reads only these.
MANIFEST = ".manifest.json"
MAX_ATTEMPTS = 3  # a shard that has taken three processes down is not given to a fourth
_VERSION = 1
_ATTEMPTS, _LOST = ".attempts", ".lost"
_EMPTY = ".empty"  # in place of a file without captions, which `datasets` may not be able to read


class Shard(NamedTuple):
    """
    Images whose captions become one file.

    Attributes:
        number: its place among all shards, from 0.
        name: what messages call it.
        images: the files and URLs that it consists of, or `None` where its source has shards by itself.
    """

    number: int
    name: str
    images: list[str] | None = None


@dataclass(frozen=True)
class ShardResult:
    """
    What became of a shard.

    Attributes:
        number: the shard's.
        described, failed: images with a caption, and with an error in its place.
        error: why there is no file of captions.
        fatal: whether every other shard would end in the same error.
    """

    number: int
    described: int = 0
    failed: int = 0
    error: str | None = None
    fatal: bool = False


class ShardJob(Protocol):
    """What is done with shards. Instances are pickled and sent to the processes that work."""

    def start(self) -> Callable[[Shard], ShardResult]:
        """
        Loads the model in a worker's process; what it returns finishes one shard after the other.

        Raises:
            ValueError: if the model cannot be loaded.
        """
        ...


class ShardFolder:
    """
    A folder with one file of captions per shard of images.

    Args:
        path (`str` or `os.PathLike`): created by [`prepare`] if it does not exist.
        count (`int`): shards in total.
        suffix (`str`): of the files, such as `".jsonl"`.
    """

    def __init__(self, path: PathLike, count: int, suffix: str) -> None:
        self.path, self.count, self.suffix = Path(path), count, suffix

    def file(self, number: int) -> Path:
        """The file of a shard, named as `datasets` names them: `captions-00003-of-00020.jsonl`."""
        return self.path / f"captions-{number:05d}-of-{self.count:05d}{self.suffix}"

    def prepare(self, settings: Mapping[str, object]) -> None:
        """
        Creates the folder, or checks that an earlier run there had the same settings.

        Args:
            settings (`Mapping[str, object]`): by the names that messages use, JSON values.

        Raises:
            ValueError: for a folder of another run, or with other content.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"cannot write to {str(self.path)!r}: it is not a folder, and shards need one; choose another --output"
            ) from error
        manifest = self.path / MANIFEST
        mine = {"version": _VERSION, "format": self.suffix, **settings, "shards": self.count}
        if manifest.is_file():
            self._compare(manifest, mine)
            for kind in (_ATTEMPTS, _LOST):
                for note in self.path.glob(f".captions-*{kind}"):
                    note.unlink(missing_ok=True)
            return
        foreign = next((entry.name for entry in os.scandir(self.path) if not entry.name.startswith(".")), None)
        if foreign is not None:
            raise ValueError(
                f"{str(self.path)!r} holds {foreign!r}, but no shards of an earlier run; choose another --output"
            )
        write_json(manifest, mine)

    def _compare(self, manifest: Path, mine: Mapping[str, object]) -> None:
        try:
            earlier = json.loads(manifest.read_bytes())
        except (ValueError, RecursionError):
            earlier = None
        if not isinstance(earlier, dict):
            raise ValueError(f"{str(manifest)!r} is damaged; choose another --output")
        for key, value in mine.items():
            if earlier.get(key) != value:
                raise ValueError(
                    f"{str(self.path)!r} was made with {key} {_brief(earlier.get(key))}, but this run has {key} "
                    f"{_brief(value)}; use the same or choose another --output"
                )

    def finished(self) -> set[int]:
        """The numbers of the shards whose files are there, or from which no image could be described."""
        names = {entry.name for entry in os.scandir(self.path)}
        return {
            number
            for number in range(self.count)
            if self.file(number).name in names or self._note(number, _EMPTY).name in names
        }

    def is_finished(self, number: int) -> bool:
        """Whether a shard is among [`finished`]."""
        return self.file(number).exists() or self._note(number, _EMPTY).exists()

    def hide(self, number: int) -> None:
        """Renames the file of a finished shard that has no captions."""
        os.replace(self.file(number), self._note(number, _EMPTY))

    def failed(self) -> dict[int, str]:
        """The errors of the shards that [`note_failure`] was told of in this run."""
        notes = {number: self._note(number, _LOST) for number in range(self.count)}
        names = {entry.name for entry in os.scandir(self.path)}
        return {number: note.read_text("utf-8") for number, note in notes.items() if note.name in names}

    def note_failure(self, number: int, error: str) -> None:
        """Keeps the other processes of this run from trying a shard again."""
        write_atomically(self._note(number, _LOST), error)

    @contextlib.contextmanager
    def attempt(self, number: int) -> Iterator[int]:
        """Counts the attempts at a shard in this run, from 1: those during which the process died, and this one."""
        note = self._note(number, _ATTEMPTS)
        with open(note, "ab") as file:
            file.write(b".")
        try:
            yield note.stat().st_size
        finally:
            note.unlink(missing_ok=True)

    @contextlib.contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """
        Takes a shard, unless it is finished, has failed or another process has it; yields whether it did.

        The system frees the claims of a process that ends, however it ends. On a file system whose locks do not reach
        other machines two of them may do the same shard; then its file is replaced by an equal one.
        """
        path, failure = self.file(number), self._note(number, _LOST)
        if self.is_finished(number) or failure.exists():
            yield False
            return
        try:
            with file_lock(path, "taken"):
                yield not (self.is_finished(number) or failure.exists())
                if self.is_finished(number) or failure.exists():
                    # Whoever gets the lock from now on finds one of them, whether it is this lock or a new one.
                    path.with_name(f".{path.name}{LOCK_FILE}").unlink(missing_ok=True)
        except InUseError:
            yield False

    def _note(self, number: int, kind: str) -> Path:
        file = self.file(number)
        return file.with_name(f".{file.name}{kind}")


def split(images: Sequence[str], size: int) -> list[Shard]:
    """
    Shards of a list of images.

    Args:
        images (`Sequence[str]`): files and URLs.
        size (`int`): images per shard; the last one may have fewer.
    """
    slices = [list(images[first : first + size]) for first in range(0, len(images), size)]
    return [Shard(number, f"shard {number}, from {part[0]}", part) for number, part in enumerate(slices)]


def finish_shard(shard: Shard, folder: ShardFolder, write: Callable[[Shard, Path], tuple[int, int]]) -> ShardResult:
    """
    Write the file of one shard, unless it is there. A shard without captions gets a hidden file instead.

    Args:
        shard (`Shard`): whose images are described.
        folder (`ShardFolder`): where its file goes.
        write (`Callable`): writes the file of a shard in one step, as [`~utils.files.atomic_file`] does, and returns
            how many of its images have been described and how many have failed.

    Returns:
        `ShardResult`: with every error in it, because a shard that fails must not take others with it.
    """
    path = folder.file(shard.number)
    if folder.is_finished(shard.number):
        return ShardResult(shard.number)
    try:
        with folder.attempt(shard.number) as attempts:
            remove_leftovers(path)
            if attempts > MAX_ATTEMPTS:
                raise ValueError(f"{MAX_ATTEMPTS} processes died while they worked on it")
            described, failed = write(shard, path)
            if not described:
                folder.hide(shard.number)
    except Exception as error:
        return ShardResult(shard.number, error=first_line(error), fatal=is_disk_full(error))
    return ShardResult(shard.number, described, failed)


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."
