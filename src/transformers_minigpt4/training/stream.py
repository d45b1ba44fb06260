"""Streams of rows that know their position, so that an interrupted run resumes with the very next row."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import TypeAlias

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from transformers_minigpt4.data.schema import Row

from .collator import Batch, Collator
from .sanity_checks import TrainingError


_IN_WORKER = "in DataLoader worker process"  # how torch begins an error that it passes on from a worker
POSITION = "position"  # its key in a batch; the trainer removes it


@dataclass
class Position:
    """Position of one worker of one rank after a batch: rows given so far, epoch of the source, and its state."""

    worker: int
    rows: int
    epoch: int
    state: dict[str, object]


Item: TypeAlias = tuple[Row | None, Position | None]


class PositionedStream(torch.utils.data.IterableDataset):
    """
    Rows of a source, epoch after epoch without end, each row that ends a batch with the position after it.

    A loader fetches ahead, so the source itself is further than training; that is why batches carry positions. When a
    run resumes, each worker gives `None` for rows that were trained on (the trainer skips these batches by their
    number) and then continues from the source's state: nothing is read twice, and the order of workers is kept.

    Args:
        source (`IterableDataset`): Rows, with `state_dict`, `load_state_dict` and `set_epoch`. A buffer filled by
            `source.shuffle(buffer_size=…)` is not part of its state: shuffle shards instead.
        batch_size (`int`): Rows per batch of one process.
        rank, world_size (`int`): This process, and how many share the source, without overlap.
        start (`dict[int, Position]`, *optional*): Positions by worker to resume from.
    """

    def __init__(
        self,
        source: IterableDataset,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: dict[int, Position] | None = None,
    ) -> None:
        if world_size > 1:
            # Complete shards to each process; if there are too few, every process reads all and keeps its rows.
            enough = source.num_shards >= world_size
            source = source.shard(world_size, rank) if enough else split_dataset_by_node(source, rank, world_size)
        self.source = source
        self.batch_size = batch_size
        self.start = start or {}

    def __iter__(self) -> Iterator[Item]:
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
                return  # a worker without a shard, or an empty source, which the sanity checks report
            start = None
            epoch += 1


class StreamEpochs(TrainerCallback):
    """
    Counts the epochs of a stream by rows: `epoch` in the log is the number of rows seen over those of an epoch.

    transformers takes an endless stream for one epoch. Where the strategy of saving or evaluating is `epoch`, this
    also does it each time that all rows have been seen.

    Args:
        rows (`int`, *optional*): Rows of an epoch; without it, the log has no `epoch`.
    """

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows

    def on_step_end(self, args, state, control, **kwargs):
        if self.rows is None:
            state.epoch = None
            return
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        state.epoch = state.global_step * batch / self.rows
        ended = int(state.epoch) > int((state.global_step - 1) * batch / self.rows)
        if ended and state.global_step < state.max_steps:  # transformers does it after the last step
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH


class PositionCollator:
    """Collates the rows of a [`PositionedStream`] and passes their position on; skipped batches become empty."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, items: list[Item]) -> Batch:
        rows = [row for row, _ in items if row is not None]
        return {**self.collator(rows), POSITION: items[-1][1]} if rows else {}


def stream_loader(stream: PositionedStream, collator: Collator, arguments: TrainingArguments) -> DataLoader:
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
    The plain error of a data worker: torch wraps it into its traceback, and reports a worker's death only by number.

    Returns:
        An error of the same type with the worker's own message; one with cause and remedy for a worker that died;
        `None` for an error that came from no worker.
    """
    head, _, trace = str(error).partition("\n")
    if _IN_WORKER in head:
        message = trace.rpartition(f"{type(error).__name__}: ")[2].strip()
        return type(error)(message or head)
    if isinstance(error, RuntimeError) and head.startswith("DataLoader worker"):
        return TrainingError(
            f"A data worker died ({head.strip()}). Usually the system ran out of memory and killed it: lower "
            "dataloader_num_workers or per_device_train_batch_size, or give the machine more (shared) memory, and "
            "resume with --resume-from-checkpoint true."
        )
    return None
