"""The images that command-line arguments name: files, folders and URLs, or a source of training data."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from transformers_minigpt4.data.readers import BadRow, Reader
from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.data.sources import open_reader, parse_source
from transformers_minigpt4.data.webdataset import WebdatasetReader
from transformers_minigpt4.inference.sources import expand_sources
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError

from .images import BulkImage, is_source


class ShardError(ValueError):
    """A shard that cannot be read to its end."""


@dataclass(frozen=True)
class SourceShard:
    """
    A shard of a source that has shards: a tar file, or a file of a dataset.

    Args:
        reader: Reads the source.
        number: Which of its shards.
        name: What messages call it, and the first part of its images' keys.
    """

    reader: Reader
    number: int
    name: str

    def images(self, whole: bool = True) -> Iterator[BulkImage]:
        """
        Its images, each time in the same order; rows without a usable image as errors.

        Args:
            whole: Whether a shard that cannot be opened or read to its end raises, after the images before that;
                otherwise this is given as an error too.

        Raises:
            ShardError: see `whole`.
        """
        prefix = self.name.rpartition("/")[2] + "/" if isinstance(self.reader, WebdatasetReader) else f"{self.number}/"
        for entry in self.reader.read(self.number, None):
            stem = entry.key.removeprefix(prefix)
            key = f"{self.name}/{stem}"
            if isinstance(entry, BadRow) and entry.kind == "shard":
                if whole:
                    raise ShardError(f"{self.name} cannot be read to its end: {entry.reason}")
                advice = "download or make the shard again"
                yield BulkImage(self.name, ImageLoadError(repr(self.name), entry.reason, advice))
                return
            if len(entry.images) != 1:
                reason = entry.reason if isinstance(entry, BadRow) else f"{len(entry.images)} images in one row"
                error = ImageLoadError(repr(key), reason, "give each row one image")
                yield BulkImage(key, error, stem)
                continue
            content, path = entry.images[0]["bytes"], entry.images[0]["path"]
            yield BulkImage(key, content if content is not None else str(path), stem)


def open_sources(arguments: Iterable[str], stdin: TextIO | None = None) -> tuple[list[str], list[SourceShard]]:
    """
    The files and URLs, and the shards, that arguments name.

    Args:
        arguments (`Iterable[str]`): What [`expand_sources`] takes, and `KIND:PATH` as for training. Sources that list
            image files (`table:`, `imagefolder:` and so on) give these files; captions that they have are not used.
        stdin (`TextIO`, *optional*): where `-` is read from.

    Raises:
        DataError: for a source that cannot be opened.
        ValueError: as of [`expand_sources`].
    """
    files: list[str] = []
    shards: list[SourceShard] = []
    for argument in arguments:
        if not is_source(argument):
            files += expand_sources([argument], stdin)
            continue
        source = parse_source(argument)
        reader = open_reader(source, captions=False)
        if isinstance(reader, WebdatasetReader):
            shards += [SourceShard(reader, number, path) for number, path in enumerate(reader.shards)]
        elif source.kind == "dataset":
            shards += [SourceShard(reader, number, f"{source}/{number}") for number in range(reader.num_shards)]
        else:
            files += _listed_files(reader, argument)
    return list(dict.fromkeys(files)), shards


def _listed_files(reader: Reader, argument: str) -> Sequence[str]:
    entries = (entry for number in range(reader.num_shards) for entry in reader.read(number, None))
    files = [str(image["path"]) for entry in entries for image in entry.images]
    if not files:
        raise DataError(f"{argument} names no image file")
    return files
