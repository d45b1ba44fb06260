"""Streams of rows that know their position, so that a stopped run goes on with the very next row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info

from .sanity_checks import TrainingError


_IN_WORKER = "in DataLoader worker process"  # how torch begins an error that it carries over from a worker
POSITION = "position"  # the key under which a batch carries it; the trainer takes it out


@dataclass
class Position:
    """Where one worker of one rank stands after a batch: rows given so far, pass over the source, and its state."""

    worker: int
    rows: int
    epoch: int
    state: dict[str, Any]


class PositionedStream(torch.utils.data.IterableDataset):
    """
    Rows of a source, pass after pass without end, each with the position after it where a batch ends.

    A loader fetches ahead, so the source itself is further than training; that is why batches carry positions. When a
    run goes on, each worker gives `None` for rows that were trained on (the trainer skips these batches by their
    number) and then continues from the source's state: nothing is read twice, and the order of workers stays.

    Args:
        source (`IterableDataset`): Rows, with `state_dict`, `load_state_dict` and `set_epoch`. A buffer filled by
            `source.shuffle(buffer_size=…)` is not part of its state: shuffle shards instead.
        batch_size (`int`): Rows per batch of one process.
        rank, world_size (`int`): This process, and how many share the source, without overlap.
        start (`dict[int, Position]`, *optional*): Positions by worker to go on from.
    """

    def __init__(
        self,
        source: IterableDataset,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: dict[int, Position] | None = None,
    ):
        if world_size > 1:
            # Whole shards to each process; where there are too few, every process reads all and keeps its rows.
            enough = source.num_shards >= world_size
            source = source.shard(world_size, rank) if enough else split_dataset_by_node(source, rank, world_size)
        self.source = source
        self.batch_size = batch_size
        self.start = start or {}

    def __iter__(self) -> Iterator[tuple[dict[str, Any] | None, Position | None]]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        start = self.start.get(worker)
        rows, epoch = (start.rows, start.epoch) if start else (0, 0)
        yield from repeat((None, None), rows)
        while True:
            rows_before = rows
            self.source.set_epoch(epoch)
            if start is not None:
                self.source.load_state_dict(start.state)
            for row in self.source:
                rows += 1
                at_end = rows % self.batch_size == 0
                yield row, Position(worker, rows, epoch, self.source.state_dict()) if at_end else None
            if rows == rows_before and start is None:
                return  # a worker without a shard, or an empty source, which the guards report
            start = None
            epoch += 1


class PositionCollator:
    """Collates the rows of a [`PositionedStream`] and hands their position on; skipped batches become empty."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, items: list[tuple[dict[str, Any] | None, Position | None]]) -> dict[str, Any]:
        rows = [row for row, _ in items if row is not None]
        return {**self.collator(rows), POSITION: items[-1][1]} if rows else {}


def stream_loader(stream: PositionedStream, collator: Callable, arguments: Any) -> DataLoader:
    """A loader with the workers that the training arguments ask for."""
    return DataLoader(
        stream,
        batch_size=stream.batch_size,
        collate_fn=PositionCollator(collator),
        num_workers=arguments.dataloader_num_workers,
        pin_memory=arguments.dataloader_pin_memory,
        prefetch_factor=arguments.dataloader_prefetch_factor,
        drop_last=True,
    )


def plain_worker_error(error: Exception) -> Exception | None:
    """
    What a data worker meant: torch wraps a worker's error into its traceback, and tells of its death by number alone.

    Returns:
        An error of the same type with the worker's own message; one with cause and cure for a worker that died;
        `None` for an error that came from no worker.
    """
    head, _, trace = str(error).partition("\n")
    if _IN_WORKER in head:
        message = trace.rpartition(f"{type(error).__name__}: ")[2].strip()
        return type(error)(message or head)
    if isinstance(error, RuntimeError) and head.startswith("DataLoader worker"):
        return TrainingError(
            f"A data worker died ({head.strip()}). Mostly the system ran out of memory and ended it: lower "
            "dataloader_num_workers or per_device_train_batch_size, or give the machine more (shared) memory, and go "
            "on with --resume_from_checkpoint true."
        )
    return None
