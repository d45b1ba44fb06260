"""Reads one source as an iterable of `datasets`: for many epochs, split without overlap, resumed at the exact row."""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import TypedDict

import numpy as np
from datasets import DatasetInfo, Features, IterableDataset, Value
from datasets import List as ListFeature
from datasets.iterable_dataset import _BaseExamplesIterable

from .readers import Entry, RawRow, Reader
from .schema import DataError, Message, UndecodedImage
from .skipped_rows import SkippedRows


class RawColumns(TypedDict):
    """What a source gives before it is rendered."""

    key: str
    source: int
    epoch: int
    images: list[UndecodedImage]
    caption: str | None
    messages: list[Message] | None


class StreamState(TypedDict):
    """Position in a source: `shard` in the order of the epoch, `entry` in the shard, bad entries included."""

    epoch: int
    shard: int
    entry: int
    usable: int
    type: str


# Sources can be mixed because they all have these columns.
RAW_FEATURES = Features(
    {
        "key": Value("string"),
        "source": Value("int64"),
        "epoch": Value("int64"),
        "images": ListFeature({"bytes": Value("binary"), "path": Value("string")}),
        "caption": Value("string"),
        "messages": ListFeature(
            {"role": Value("string"), "content": ListFeature({"type": Value("string"), "text": Value("string")})}
        ),
    }
)


def raw_row(entry: RawRow, source: int, number: int) -> RawColumns:
    """A good entry with the numbers of its source and epoch."""
    return {
        "key": entry.key,
        "source": source,
        "epoch": number,
        "images": entry.images,
        "caption": entry.caption,
        "messages": entry.messages,
    }


class SourceIterable(_BaseExamplesIterable):
    """
    The rows of one source.

    `datasets`' own iterable of a generator cannot do two things that training needs: order each epoch anew without a
    shuffle buffer (whose content a resumed run loses), and never end, with each data worker keeping its shards.

    Args:
        reader: Reads the shards.
        source: Number of the source.
        skipped: Counts what is read and skipped.
        seed: Draws the order of each epoch; `None` keeps the files' order.
        epochs: How often the source is read; `None` never ends.
        min_shards: Splits shards into pieces, each read separately, if the source has fewer.
    """

    _sleep_on_threads_shutdown = False

    def __init__(
        self,
        reader: Reader,
        source: int,
        skipped: SkippedRows,
        seed: int | None,
        epochs: int | None,
        min_shards: int = 1,
    ) -> None:
        super().__init__()
        self.reader, self.source, self.skipped, self.seed, self.epochs = reader, source, skipped, seed, epochs
        self.pieces = -(-min_shards // reader.num_shards)
        self.shards = [(shard, piece) for piece in range(self.pieces) for shard in range(reader.num_shards)]

    def __deepcopy__(self, memo: dict[int, object]) -> "SourceIterable":
        return copy.copy(self)  # `interleave_datasets` copies what it mixes, but tables are large and counts shared

    @property
    def is_typed(self) -> bool:
        return True

    @property
    def features(self) -> Features:
        return RAW_FEATURES

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def _init_state_dict(self) -> StreamState:
        self._state_dict = self._start()
        return self._state_dict

    def _start(self) -> StreamState:
        return {"epoch": 0, "shard": 0, "entry": 0, "usable": 0, "type": type(self).__name__}

    def __iter__(self) -> Iterator[tuple[str, RawColumns]]:
        state: StreamState = self._state_dict if self._state_dict is not None else self._start()
        while self.epochs is None or state["epoch"] < self.epochs:
            for shard, piece in self._order(state["epoch"])[state["shard"] :]:
                self.skipped.count(self.source, "shards")
                for entry in islice(self._entries(shard, piece, state["epoch"]), state["entry"], None):
                    state["entry"] += 1
                    if self.skipped.accepts(entry, self.source):
                        state["usable"] += 1
                        yield f"{state['epoch']}/{entry.key}", raw_row(entry, self.source, state["epoch"])
                state["shard"] += 1
                state["entry"] = 0
            if self.epochs is None and not state["usable"]:
                raise DataError(f"no usable row among {self.num_shards} shards:\n{self.skipped.report()}")
            state.update({"epoch": state["epoch"] + 1, "shard": 0, "usable": 0})

    def _order(self, number: int) -> list[tuple[int, int]]:
        if self.seed is None:
            return self.shards
        draw = np.random.default_rng([self.seed, self.source, number])
        return [self.shards[place] for place in draw.permutation(len(self.shards))]

    def _entries(self, shard: int, piece: int, number: int) -> Iterator[Entry]:
        seed = [self.seed, self.source, number, shard] if self.seed is not None else None
        return islice(self.reader.read(shard, seed), piece, None, self.pieces)

    def entries(self) -> Iterator[Entry]:
        """One epoch of all entries of the source, good and bad; only its shards are counted."""
        for shard, piece in self._order(0):
            self.skipped.count(self.source, "shards")
            yield from self._entries(shard, piece, 0)

    def shuffle_data_sources(self, generator: np.random.Generator) -> "SourceIterable":
        """Another order, as `IterableDataset.set_epoch` asks for; an unshuffled source keeps its own."""
        other = copy.copy(self)
        if self.seed is not None:
            other.seed = (self.seed + int(copy.deepcopy(generator).integers(1 << 31))) % (1 << 31)
        return other

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> "SourceIterable":
        """Only some of the shards, for one process or data worker."""
        other = copy.copy(self)
        chosen = self.split_shard_indices_by_worker(num_shards, index, contiguous=contiguous)
        other.shards = [self.shards[place] for place in chosen]
        return other

    def reshard_data_sources(self) -> "SourceIterable":
        """There are no smaller shards than these; see `min_shards`."""
        return copy.copy(self)

    def dataset(self) -> IterableDataset:
        """This as a dataset."""
        return IterableDataset(self, info=DatasetInfo(features=RAW_FEATURES))
