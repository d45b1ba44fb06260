"""Reads one source as an iterable of `datasets`: pass after pass, split without overlap, resumed at the exact row."""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from datasets import DatasetInfo, Features, IterableDataset, Value
from datasets import List as ListFeature
from datasets.iterable_dataset import _BaseExamplesIterable

from .readers import Entry, Reader
from .schema import DataError
from .skipped_rows import Problems


# What a source gives before it is rendered. Sources can be mixed because they all have these.
RAW_FEATURES = Features(
    {
        "key": Value("string"),
        "source": Value("int64"),
        "pass": Value("int64"),
        "images": ListFeature({"bytes": Value("binary"), "path": Value("string")}),
        "caption": Value("string"),
        "messages": ListFeature(
            {"role": Value("string"), "content": ListFeature({"type": Value("string"), "text": Value("string")})}
        ),
    }
)


def raw_row(entry: Any, source: int, number: int) -> dict[str, Any]:
    """A good entry as `RAW_FEATURES` has it, with the numbers of its source and pass."""
    return {
        "key": entry.key,
        "source": source,
        "pass": number,
        "images": entry.images,
        "caption": entry.caption,
        "messages": entry.messages,
    }


class SourceIterable(_BaseExamplesIterable):
    """
    The rows of one source.

    `datasets`' own iterable of a generator cannot do two things that training needs: order each pass anew without a
    shuffle buffer (whose content a resumed run loses), and go on for ever with each data worker keeping its shards.

    Args:
        reader: Reads the shards.
        source: Number of the source.
        problems: Counts what is read and skipped.
        seed: Draws the order of each pass; `None` keeps the files' order.
        passes: How often the source is read; `None` for ever.
        min_shards: Makes parts of shards, each read by itself, where the source has fewer.
    """

    _sleep_on_threads_shutdown = False

    def __init__(
        self,
        reader: Reader,
        source: int,
        problems: Problems,
        seed: int | None,
        passes: int | None,
        min_shards: int = 1,
    ) -> None:
        super().__init__()
        self.reader, self.source, self.problems, self.seed, self.passes = reader, source, problems, seed, passes
        self.parts = -(-min_shards // reader.num_shards)
        self.shards = [(shard, part) for part in range(self.parts) for shard in range(reader.num_shards)]

    def __deepcopy__(self, memo: dict[int, Any]) -> "SourceIterable":
        return copy.copy(self)  # `interleave_datasets` copies what it mixes, but lists are large and counts shared

    @property
    def is_typed(self) -> bool:
        return True

    @property
    def features(self) -> Features:
        return RAW_FEATURES

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def _init_state_dict(self) -> dict[str, Any]:
        # `shard` and `entry` are positions: in the order of the pass, and in the shard, bad entries included.
        self._state_dict = self._start()
        return self._state_dict

    def _start(self) -> dict[str, Any]:
        return {"pass": 0, "shard": 0, "entry": 0, "usable": 0, "type": type(self).__name__}

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        state: dict[str, Any] = self._state_dict if self._state_dict is not None else self._start()
        while self.passes is None or state["pass"] < self.passes:
            for shard, part in self._order(state["pass"])[state["shard"] :]:
                self.problems.count(self.source, "shards")
                for entry in islice(self._entries(shard, part, state["pass"]), state["entry"], None):
                    state["entry"] += 1
                    if self.problems.accepts(self.source, entry):
                        state["usable"] += 1
                        yield f"{state['pass']}/{entry.key}", raw_row(entry, self.source, state["pass"])
                state["shard"] += 1
                state["entry"] = 0
            if self.passes is None and not state["usable"]:
                raise DataError(f"no usable row among {self.num_shards} shards:\n{self.problems.report()}")
            state.update({"pass": state["pass"] + 1, "shard": 0, "usable": 0})

    def _order(self, number: int) -> list[tuple[int, int]]:
        if self.seed is None:
            return self.shards
        draw = np.random.default_rng([self.seed, self.source, number])
        return [self.shards[place] for place in draw.permutation(len(self.shards))]

    def _entries(self, shard: int, part: int, number: int) -> Iterator[Entry]:
        seed = [self.seed, self.source, number, shard] if self.seed is not None else None
        return islice(self.reader.read(shard, seed), part, None, self.parts)

    def entries(self) -> Iterator[Entry]:
        """One pass of all that the source holds, good and bad; only its shards are counted."""
        for shard, part in self._order(0):
            self.problems.count(self.source, "shards")
            yield from self._entries(shard, part, 0)

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
        """This as a data set."""
        return IterableDataset(self, info=DatasetInfo(features=RAW_FEATURES))
