"""What every reader gives, and the readers of annotation files and of Hugging Face datasets."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from datasets import Image, IterableDataset

from transformers_minigpt4.utils.json_files import brief

from .schema import DataError, Message, UndecodedImage


# As many rows as the authors' `wds.shuffle(1000)` holds. It is emptied at the end of each shard, so that a shard that
# is read again from its start gives the same order.
SHUFFLE_BUFFER = 1000
_TABLE_SHARDS = 256  # slices of a table, for as many data workers of all processes
CAPTION_COLUMNS = ("caption", "text")


class RawRow(NamedTuple):
    """A row as its source has it; `caption` is `None` for several turns."""

    key: str
    images: list[UndecodedImage]
    caption: str | None
    messages: list[Message] | None = None


class BadRow(NamedTuple):
    """
    A row that cannot be used: its kind of `skipped_rows.KINDS`, and why.

    If only its caption is missing or bad, it has its images: they can still be described.
    """

    kind: str
    key: str
    reason: str
    images: Sequence[UndecodedImage] = ()


Entry = RawRow | BadRow


class Reader(Protocol):
    """Reads one source, shard by shard. Bad rows are given as `BadRow`, never raised as exceptions."""

    @property
    def num_shards(self) -> int: ...

    @property
    def length(self) -> int | None:
        """Usable rows of an epoch as far as annotations show, or `None` if only reading all shards would tell."""
        ...

    def read(self, shard: int, seed: list[int] | None) -> Iterator[Entry]:
        """The entries of a shard, each time the same ones in the same order; `None` as seed keeps the file's order."""
        ...

    def fingerprint(self) -> str:
        """Text that changes when the data change."""
        ...


def caption_row(key: str, images: list[UndecodedImage], caption: object) -> Entry:
    """The row of a caption, or why there is none."""
    if not isinstance(caption, str) or not caption.strip():
        reason = "there is no caption" if caption is None else f"the caption is {brief(caption)}"
        return BadRow("caption", key, reason, images)
    return RawRow(key, images, caption)


def shuffled(entries: Iterator[Entry], seed: list[int] | None, size: int = SHUFFLE_BUFFER) -> Iterator[Entry]:
    """Entries in random order, drawn with a buffer of `size`; in their own order without a seed."""
    if seed is None:
        yield from entries
        return
    draw = np.random.default_rng(seed)
    buffer: list[Entry] = []
    for entry in entries:
        if len(buffer) < size:
            buffer.append(entry)
            continue
        place = int(draw.integers(size))
        yield buffer[place]
        buffer[place] = entry
    for place in draw.permutation(len(buffer)):
        yield buffer[place]


class AnnotationReader:
    """
    Reads annotations: image files with texts, kept as an Arrow table that forked data workers share.

    Args:
        name: What messages call the source.
        entries: The entries of the annotation file, good or bad.

    Raises:
        DataError: for annotations without an entry.
    """

    def __init__(self, name: str, entries: Iterator[Entry]) -> None:
        columns: dict[str, list[str | None]] = {
            column: [] for column in ("key", "images", "caption", "messages", "kind", "reason")
        }
        for entry in entries:
            values: tuple[str | None, ...]
            images = json.dumps([str(image["path"]) for image in entry.images]) if entry.images else None
            if isinstance(entry, BadRow):
                values = (entry.key, images, None, None, entry.kind, entry.reason)
            else:
                messages = json.dumps(entry.messages) if entry.messages is not None else None
                values = (entry.key, images, entry.caption, messages, None, None)
            for column, value in zip(columns.values(), values):
                column.append(value)
        if not columns["key"]:
            raise DataError(f"{name} lists no images")
        self.table = pa.table({column: pa.array(values, pa.large_string()) for column, values in columns.items()})
        self.num_shards = min(len(self.table), _TABLE_SHARDS)
        self.length = self.table["kind"].null_count  # the others cannot be used

    def read(self, shard: int, seed: list[int] | None) -> Iterator[Entry]:
        size = len(self.table)
        bounds = [size * place // self.num_shards for place in (shard, shard + 1)]
        rows = np.arange(*bounds)
        if seed is not None:
            # One order of the table, of which each shard is a slice: only the last number of a seed is the shard.
            rows = np.random.default_rng(seed[:-1]).permutation(size)[slice(*bounds)]
        for row in self.table.take(pa.array(rows)).to_pylist():
            paths = [] if row["images"] is None else json.loads(row["images"])
            images: list[UndecodedImage] = [{"bytes": None, "path": path} for path in paths]
            if row["kind"] is not None:
                yield BadRow(row["kind"], row["key"], row["reason"], images)
                continue
            messages = json.loads(row["messages"]) if row["messages"] is not None else None
            yield RawRow(row["key"], images, row["caption"], messages)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for column in self.table.combine_chunks().columns:
            for value in column.chunks:
                for buffer in value.buffers():
                    digest.update(memoryview(buffer) if buffer is not None else b"-")
        return digest.hexdigest()


class DatasetReader:
    """Reads a Hugging Face dataset of images and captions, streamed; without `captions`, one that may have none."""

    def __init__(self, name: str, dataset: IterableDataset, length: int | None = None, captions: bool = True) -> None:
        features = dataset.features or {}
        images = [column for column, feature in features.items() if isinstance(feature, Image)]
        texts = [column for column in CAPTION_COLUMNS if column in features]
        if len(images) != 1 or (captions and not texts):
            found = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
            wanted = " and a column `caption` or `text`" if captions else ""
            raise DataError(f"{name} needs one column of images{wanted}; it has {found or 'none'}")
        self.image = images[0]
        self.caption = texts[0] if texts else None
        self.id = next((column for column in ("image_id", "id", "key") if column in features), None)
        self.name = name
        # The images' own bytes: a broken one is then found row by row, and a resumed run need not decode again.
        self.dataset = dataset.decode(False)
        self.num_shards = self.dataset.num_shards
        self.length = length

    def read(self, shard: int, seed: list[int] | None) -> Iterator[Entry]:
        return shuffled(self._read(shard), seed)

    def _read(self, shard: int) -> Iterator[Entry]:
        rows = self.dataset.shard(num_shards=self.num_shards, index=shard)
        number = 0
        try:
            # `iter` with a batch size, because plain iteration would split the shard among data workers once more.
            # As Arrow tables, whose values become Python's one at a time, since one that cannot is one bad row.
            for batch in rows.with_format("arrow").iter(batch_size=16):
                for place in range(batch.num_rows):
                    yield self._row(f"{shard}/", number, batch.slice(place, 1))
                    number += 1
        except (OSError, ValueError, RuntimeError, pa.ArrowException) as error:
            yield BadRow("shard", f"shard {shard}", f"{type(error).__name__} after {number} rows: {error}")

    def _row(self, prefix: str, number: int, row: pa.Table) -> Entry:
        try:
            label = row[self.id][0].as_py() if self.id is not None else number
            key = f"{prefix}{label}"
            image = row[self.image][0].as_py()
            caption = row[self.caption][0].as_py() if self.caption is not None else None
        except UnicodeDecodeError as error:
            return BadRow("entry", f"{prefix}row {number}", f"a text is not UTF-8: {error}")
        if image is None or (image["bytes"] is None and not image["path"]):
            return BadRow("image", key, "the row has no image")
        return caption_row(key, [{"bytes": image["bytes"], "path": image["path"]}], caption)

    def fingerprint(self) -> str:
        return f"{self.name} {self.num_shards} {self.dataset.features}"


def image_file(folder: Path, name: str) -> list[UndecodedImage]:
    """The images of a row that has one, as a file."""
    return [{"bytes": None, "path": str(folder / name)}]
