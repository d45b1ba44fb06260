"""Measures a run's samples per second and how much of its batches is padding."""

import time

import torch
from transformers import TrainerCallback

from .collator import Batch
from .packing import count_tokens


class ThroughputCallback(TrainerCallback):
    """
    Adds `samples_per_second` and `non_padding_fraction` since the last log to every log of a loss.

    The time of evaluations and checkpoints does not count. Callbacks do not see batches, so the trainer calls
    [`count`] with each. It must come before the callbacks that report logs.
    """

    def __init__(self) -> None:
        self.rows: torch.Tensor | int = 0
        self.tokens: torch.Tensor | int = 0
        self.positions = 0
        self.since = time.perf_counter()
        self.interrupted = False  # by an evaluation or a checkpoint

    def count(self, batch: Batch) -> None:
        """Counts a batch, without waiting for its device."""
        rows, tokens, positions = count_tokens(batch)
        self.rows, self.tokens, self.positions = self.rows + rows, self.tokens + tokens, self.positions + positions

    def on_step_begin(self, args, state, control, **kwargs):
        if self.interrupted:
            self._restart()

    def on_evaluate(self, args, state, control, **kwargs):
        self.interrupted = True

    def on_save(self, args, state, control, **kwargs):
        self.interrupted = True

    def on_train_begin(self, args, state, control, **kwargs):
        self._restart()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}) or not self.positions:
            return
        samples = int(self.rows) * args.world_size
        measured = {
            "samples_per_second": round(samples / (time.perf_counter() - self.since), 3),
            "non_padding_fraction": round(float(self.tokens) / self.positions, 4),
        }
        logs.update(measured)
        state.log_history[-1].update(measured)  # a copy of `logs`
        self._restart()

    def _restart(self) -> None:
        self.rows, self.tokens, self.positions, self.since = 0, 0, 0, time.perf_counter()
        self.interrupted = False
