"""Shows a run: a header, then a bar on a terminal or one line per log entry elsewhere, and a footer."""

import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments

from .stages import trainable_parameters


_DUMB = ("dumb", "unknown")  # values of TERM for terminals on which the cursor cannot move
# A narrow terminal cuts the end, so what matters most comes first.
_LABEL = len("checkpoint")  # the longest, so that header and footer have the same columns
_BAR = "{n_fmt}/{total_fmt} |{bar}| {desc}{remaining} left{postfix}"


class _Bar(tqdm):
    """tqdm without its thread, whose lock a data worker that is forked meanwhile would never get."""

    monitor_interval = 0


class TrainingProgress(TrainerCallback):
    """
    Shows the progress of a run on standard output, on the first of its processes.

    On a terminal there is a bar with loss, remaining time, learning rate and samples per second; elsewhere, and with
    `disable_tqdm`, one line of `key=value` per log entry. It comes after [`ThroughputCallback`], which measures the
    samples per second.

    Args:
        rows (`int`, *optional*): Number of different rows, if it is known.
    """

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows
        self._bar: tqdm | None = None
        self._open = ExitStack()
        self._first_step, self._since = 0, 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._first_step, self._since = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            print_facts(run_facts(args, state, model, self.rows))

    def on_step_begin(self, args, state, control, **kwargs):
        # Not earlier, so that the time in which a resumed run looks for its position does not count.
        if self._bar is None and state.is_world_process_zero and not args.disable_tqdm and on_terminal():
            self._since = time.perf_counter()
            self._open.enter_context(logging_redirect_tqdm([logging.root, logging.getLogger("transformers")]))
            self._bar = _Bar(
                total=state.max_steps,
                initial=state.global_step,
                bar_format=_BAR,
                file=sys.stdout,
                **_width(),
                miniters=1,
                smoothing=0,  # the mean of all steps, as off a terminal: one that saves takes far longer
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = log_fields(logs or {})
        if not shown or not state.is_world_process_zero:
            return
        if self._bar is None or "loss" not in shown:
            done = state.global_step - self._first_step
            if "loss" in shown and done:
                remaining = (time.perf_counter() - self._since) / done * (state.max_steps - state.global_step)
                shown["eta"] = duration(remaining)
            line = " ".join(f"{name}={value}" for name, value in shown.items())
            self._say(f"step={state.global_step}/{state.max_steps} {line}")
            return
        self._bar.set_description_str(f"loss {shown['loss']}, ", refresh=False)
        rest = [("lr {}", "lr"), ("{} samples/s", "samples/s")]
        self._bar.set_postfix_str(", ".join(text.format(shown[name]) for text, name in rest if name in shown))

    def on_train_end(self, args, state, control, **kwargs):
        self.close()
        if not state.is_world_process_zero:
            return
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        steps = state.global_step - self._first_step
        took = f"{steps:,} steps in {duration(time.perf_counter() - self._since)}"
        print_facts([("done", took + (f", loss {losses[0]:.4g} → {losses[-1]:.4g}" if losses else ""))])
        if state.best_model_checkpoint is not None:
            best = os.path.basename(state.best_model_checkpoint)
            print_facts([("best", f"{best}, eval_loss {state.best_metric:.4f} at step {state.best_global_step:,}")])

    def close(self) -> None:
        """Ends the bar, which a run that is interrupted leaves open otherwise."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._open.close()

    def _say(self, line: str) -> None:
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)


def on_terminal() -> bool:
    """Whether standard output is a terminal on which a line can be rewritten."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in _DUMB


def _width() -> dict[str, Any]:
    """tqdm's options for the size of the terminal; of one that says 0 x 0, as in some containers, 80 x 24."""
    if all(os.get_terminal_size(sys.stdout.fileno())):
        return {"dynamic_ncols": True}
    columns, rows = shutil.get_terminal_size()
    return {"ncols": columns, "nrows": rows}


def log_fields(logs: Mapping[str, float]) -> dict[str, str]:
    """What is shown of a log entry, by short name; nothing of one with neither a loss nor an evaluation."""
    shown = {name: f"{value:.4f}" for name, value in logs.items() if name.startswith("eval_") and "_loss" in name}
    if "loss" in logs:
        shown["loss"] = f"{logs['loss']:.4f}"
        if "learning_rate" in logs:
            shown["lr"] = f"{logs['learning_rate']:.3e}"
        if "samples_per_second" in logs:
            shown["samples/s"] = f"{logs['samples_per_second']:.4g}"
    if shown and logs.get("epoch") is not None:
        shown["epoch"] = f"{logs['epoch']:.3f}"
    return shown


def run_facts(
    args: TrainingArguments, state: TrainerState, model: nn.Module, rows: int | None = None
) -> list[tuple[str, str]]:
    """The header of a run: labels and values."""
    trained = sum(trainable_parameters(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    parts = {"processes": args.world_size, "GPUs": args.n_gpu, "accumulated": args.gradient_accumulation_steps}
    shape = [f"{count} {what}" for what, count in parts.items() if count > 1]
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    steps = f"{state.max_steps:,}, effective batch {batch}"
    steps += f" ({args.per_device_train_batch_size} x {' x '.join(shape)})" if shape else ""
    facts = [
        ("model", f"{name}, {trained:,} of {total:,} parameters are trained"),
        ("rows", "not known in advance" if rows is None else f"{rows:,}"),
        ("steps", steps + (f", epochs {state.max_steps * batch / rows:.3g}" if rows else "")),
        ("device", f"{device_name(args.device)}, {precision(args, model)}"),
        ("output", str(args.output_dir)),
    ]
    warmup = args.get_warmup_steps(state.max_steps)
    if warmup >= state.max_steps:
        facts.append(("warmup", f"{warmup:,} steps, so the learning rate never reaches its peak; lower warmup_steps"))
    return [*facts, ("resumed", f"at step {state.global_step:,}")] if state.global_step else facts


def device_name(device: torch.device) -> str:
    """A device by its type, with the name of a GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def precision(args: TrainingArguments, model: nn.Module) -> str:
    """The types of the weights, and of mixed precision."""
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    mixed = "bf16" if args.bf16 else "fp16" if args.fp16 else ""
    return " and ".join(sorted(dtypes)) + (f", {mixed} mixed precision" if mixed else "")


def duration(seconds: float) -> str:
    """A time as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Prints labels and values: in columns on a terminal, as `label: value` elsewhere."""
    if not on_terminal():
        for label, value in facts:
            print(f"{label}: {value}", flush=True)
        return
    grid = Table.grid(padding=(0, 2))
    last = ""
    for label, value in facts:
        grid.add_row(Text(label.ljust(_LABEL) if label != last else "", "bold"), Text(value, overflow="fold"))
        last = label
    Console(file=sys.stdout).print(grid)
