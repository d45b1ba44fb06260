"""Formats of the files that captions of a shard of images are written to, and how one is written completely."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from transformers_minigpt4.utils.files import PathLike, atomic_file, to_json, write_atomically
from transformers_minigpt4.utils.text import without_surrogates

from .images import Description


class Written(NamedTuple):
    """How many images of a shard have a caption in its file, and how many could not be described."""

    described: int
    failed: int


class Sink(Protocol):
    """
    A format of files of captions. Instances are pickled and sent to the processes that work.

    `kind` names it in `--output KIND:FOLDER`, `suffix` ends the names of its files, and `keeps_images` says whether
    they contain the images, so that descriptions must come with them.
    """

    kind: str
    suffix: str
    keeps_images: bool

    def open(self, path: Path) -> AbstractContextManager[Callable[[Description], None]]:
        """Opens a new file; what is yielded writes a described image, none that failed."""
        ...


def errors_file(path: PathLike) -> Path:
    """Where the images of a shard that could not be described are: a hidden file, which `datasets` does not read."""
    path = Path(path)
    return path.with_name(f".{path.name}.errors")


def write_shard(path: PathLike, sink: Sink, descriptions: Iterable[Description]) -> Written:
    """
    Write the file of one shard, completely or not at all.

    Images that failed are not in it, but in [`errors_file`], which is there before.

    Args:
        path (`str` or `os.PathLike`): the file; its folder must exist.
        sink (`Sink`): the format.
        descriptions (`Iterable[Description]`): of all images of the shard.

    Raises:
        OSError: if it cannot be written; whatever `descriptions` raises.
    """
    described = 0
    failures: list[str] = []
    with atomic_file(path) as scratch:
        with sink.open(scratch) as write:
            for one in descriptions:
                if one.error is not None:
                    failures.append(to_json({"image": one.image.key, "error": one.error}) + "\n")
                else:
                    write(one)
                    described += 1
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        if failures:
            write_atomically(errors_file(path), "".join(failures), sync=True)
        else:
            errors_file(path).unlink(missing_ok=True)
    return Written(described, len(failures))


class JsonLinesSink:
    """JSON Lines: `{"image", "caption", "prompt", "model"}`."""

    kind, suffix, keeps_images = "jsonl", ".jsonl", False

    def __init__(self, prompt: str, model: str) -> None:
        self.prompt, self.model = prompt, model

    @contextmanager
    def open(self, path: Path) -> Iterator[Callable[[Description], None]]:
        """See [`Sink`]."""

        def write(one: Description) -> None:
            file.write(to_json(unicode_record(one, self.prompt, self.model)) + "\n")

        with open(path, "w", encoding="utf-8") as file:
            yield write


def caption_record(one: Description, prompt: str, model: str) -> dict[str, str]:
    """A caption as it is written to JSON Lines."""
    return {"image": one.image.key, "caption": str(one.caption), "prompt": prompt, "model": model}


def unicode_record(one: Description, prompt: str, model: str) -> dict[str, str]:
    """The same for programs that read only valid Unicode, such as `datasets`; file names may be anything."""
    return {name: without_surrogates(text) for name, text in caption_record(one, prompt, model).items()}
