"""Counts the rows that cannot be used, across data workers, logs them by key, and stops a run that has too many."""

import logging
import math
from typing import TypeGuard

import torch
from torch.utils.data import get_worker_info

from .readers import BadRow, Entry, RawRow
from .schema import DataError


logger = logging.getLogger(__name__)

# What can be wrong with a row, and what each kind means.
KINDS = {
    "shard": "a file of many rows that cannot be opened or read to its end",
    "entry": "an entry that is not in the source's format",
    "image": "no image is named or stored with the text",
    "unreadable_image": "an image that is missing on the disk or cannot be decoded",
    "caption": "no caption, or an empty one",
    "prompt_format": "a row that does not fit the requested prompt format",
}
_COLUMNS = ("rows", "shards", *KINDS)
_SLOTS = 64  # data workers that count separately, so that no two write to the same place
_EXAMPLES = 10  # of one kind, source and process, each logged once; the others are only counted
# Below these numbers an error rate says nothing yet.
MIN_ROWS, MIN_SHARDS = 200, 10


class SkippedRows:
    """
    Counts of rows read and of rows skipped, by source and kind.

    The counts live in shared memory: data workers write into them and the main process reads them at any time. They
    count reading, not training: a worker reads ahead, and a resumed run starts from zero.

    Args:
        sources: The sources' names.
        max_error_rate: Fraction of a source's rows, or of its shards, above which reading stops; `None` for no limit.
        log: Whether to log skipped rows as warnings.
    """

    def __init__(self, sources: list[str], max_error_rate: float | None = 0.05, log: bool = True) -> None:
        if max_error_rate is not None and not 0 <= max_error_rate <= 1:
            raise DataError(f"max_error_rate must be between 0 and 1, not {max_error_rate}")
        self.sources = sources
        self.max_error_rate = max_error_rate
        self.log = log
        # (source, kind) -> first (key, reason) pairs of this process.
        self.examples: dict[tuple[str, str], list[tuple[str, str]]] = {}
        self._table = torch.zeros(len(sources), _SLOTS, len(_COLUMNS), dtype=torch.int64).share_memory_()

    def count(self, source: int, column: str = "rows") -> None:
        """Counts one row or shard as read, whether good or bad."""
        worker = get_worker_info()
        self._table[source, (worker.id if worker else 0) % _SLOTS, _COLUMNS.index(column)] += 1

    def accepts(self, entry: Entry, source: int) -> TypeGuard[RawRow]:
        """Counts an entry of a reader; whether it is a usable row."""
        # A broken shard is not a row; it counts among the shards.
        if not isinstance(entry, BadRow) or entry.kind != "shard":
            self.count(source)
        if isinstance(entry, BadRow):
            self.add(source, entry.kind, entry.key, entry.reason)
        return not isinstance(entry, BadRow)

    def add(self, source: int, kind: str, key: str, reason: str) -> None:
        """
        Counts and logs one row as skipped.

        Raises:
            DataError: when more than `max_error_rate` of the source is bad.
        """
        self.count(source, kind)
        # Names in data could write to the terminal.
        key, reason = (
            "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
            for text in (key, reason)
        )
        name = self.sources[source]
        examples = self.examples.setdefault((name, kind), [])
        # A row is skipped again in each epoch, and named once.
        if len(examples) < _EXAMPLES and (key, reason) not in examples:
            examples.append((key, reason))
            if self.log:
                more = "; further ones of this kind are only counted" if len(examples) == _EXAMPLES else ""
                logger.warning("%s: skipped %s (%s): %s%s", name, key, kind, reason, more)
        self._stop_if_too_many(name, self.counts()[name], key, reason)

    def _stop_if_too_many(self, name: str, seen: dict[str, int], key: str, reason: str) -> None:
        if self.max_error_rate is None:
            return
        bad_rows = sum(seen[kind] for kind in KINDS if kind != "shard")
        for bad, total, least, what in (
            (bad_rows, seen["rows"], MIN_ROWS, "rows"),
            (seen["shard"], seen["shards"], MIN_SHARDS, "shards"),
        ):
            # Three standard deviations more, or many looks at a source just below the limit would stop it by chance.
            chance = 3 * math.sqrt(self.max_error_rate * (1 - self.max_error_rate) * total)
            if total >= least and bad > self.max_error_rate * total + chance:
                raise DataError(
                    f"{bad} of the first {total} {what} of {name} cannot be used, more than max_error_rate, "
                    f"{self.max_error_rate:.1%}; the last was {key}: {reason}. `minigpt4 data check` shows more"
                )

    def counts(self) -> dict[str, dict[str, int]]:
        """For each source the numbers of `rows` and `shards` read, and of each of `KINDS` skipped."""
        table = self._table.sum(dim=1).tolist()
        return {name: dict(zip(_COLUMNS, row)) for name, row in zip(self.sources, table)}

    def report(self) -> str:
        """One line per source, for the end of a run."""
        lines = []
        for name, seen in self.counts().items():
            bad = ", ".join(f"{seen[kind]} {kind}" for kind in KINDS if seen[kind])
            bad = f"skipped: {bad}" if bad else "none skipped"
            lines.append(f"{name}: {seen['rows']} rows read, {bad}")
        return "\n".join(lines)
