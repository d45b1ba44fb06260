"""TRL's and transformers' trainers with what the stages need: schedule, small whole checkpoints, exact resume."""

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from datasets import IterableDataset
from safetensors import SafetensorError
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from . import checkpoints
from .loss import POSITIONS
from .packing import count_tokens
from .run_info import RunInfoCallback
from .sanity_checks import LabelsRequired
from .schedule import get_minigpt4_schedule
from .stages import touch_trainable
from .stream import POSITION, Position, PositionedStream, plain_worker_error, stream_loader


# What the mixin overrides and calls is a trainer's, which it stands in front of.
_Trainer: Any = Trainer if TYPE_CHECKING else object


class StageTrainerMixin(_Trainer):
    """
    Goes in front of a trainer class, see [`StageSFTTrainer`] and [`StageTrainer`].

    - `args.min_lr`, where it is set, selects the authors' schedule.
    - Checkpoints hold the trained parts, optimizer, schedule, random states and data position; they appear whole under
      their name, or not at all.
    - A streaming data set is split over ranks and workers, has no end, and goes on exactly where a run stopped.
    - Batches without images train along (`touch_trainable`).
    - One run at a time per output folder.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        dataset = kwargs.get("train_dataset")
        if dataset is not None:
            require_rows(dataset)
        self._positions: dict[int, Position] = {}
        self._staging: Path | None = None
        self._real_tokens: torch.Tensor | int = 0
        self._rows: torch.Tensor | int = 0
        self._all_tokens = 0
        self._logged_at: float | None = None
        super().__init__(*args, **kwargs)
        if self.args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end needs whole checkpoints, and these hold trained parts alone. Switch it off "
                "and load the checkpoint that you want."
            )
        if isinstance(self.train_dataset, IterableDataset) and self.args.max_steps <= 0:
            raise ValueError("A stream has no end, so the run needs one: set max_steps.")
        self.data_collator = LabelsRequired(self.data_collator)  # type: ignore[has-type]
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ThroughputBar())
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        touch_trainable(model, whole_tower=sharded)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """See [`~Trainer.train`]. A folder that holds checkpoints is resumed or refused, never written over."""
        if not self.is_world_process_zero():
            self.accelerator.wait_for_everyone()
            return self._train(resume_from_checkpoint, **kwargs)
        with checkpoints.run_lock(self.args.output_dir):
            shutil.rmtree(Path(self.args.output_dir) / checkpoints.STAGING, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            return self._train(resume_from_checkpoint, **kwargs)

    def _train(self, resume: str | bool | None, **kwargs: Any):
        checkpoint = checkpoints.resolve_resume(self.args.output_dir, resume)
        self._positions = {}
        if checkpoint is not None and isinstance(self.train_dataset, IterableDataset):
            self._positions = self._load_positions(checkpoint)
        self._logged_at = time.perf_counter()
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        except Exception as error:
            plain = plain_worker_error(error)
            if plain is None:
                raise
            raise plain from error

    def end(self) -> None:
        """
        See [`~Trainer.end`].

        torch's reducer goes before the process group. Left to be the last that holds it, the reducer waits for a
        thread of the group while it keeps Python's lock, which that thread may want: the process would never end.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        super().end()

    # Schedule

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if getattr(self.args, "min_lr", None) is None or self.lr_scheduler is not None:  # type: ignore[has-type]
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = get_minigpt4_schedule(
            optimizer or self.optimizer,
            num_training_steps,
            self.args.get_warmup_steps(num_training_steps),
            min_lr=self.args.min_lr,
            warmup_start_lr=self.args.warmup_start_lr,
            iters_per_epoch=self.args.iters_per_epoch,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # Data position

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        stream = PositionedStream(
            self.train_dataset,
            self._train_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            start=self._positions,
        )
        return stream_loader(stream, self.data_collator, self.args)

    def training_step(self, model, inputs, num_items_in_batch=None):
        position = inputs.pop(POSITION, None)
        if position is not None:
            self._positions = {**self._positions, position.worker: position}
        rows, real, every = count_tokens(inputs)
        self._rows, self._real_tokens = self._rows + rows, self._real_tokens + real
        self._all_tokens += every
        return super().training_step(model, inputs, num_items_in_batch)

    def _position_file(self, checkpoint: str | os.PathLike) -> Path:
        return Path(checkpoint) / f"data_position_{self.args.process_index}.pt"

    def _load_positions(self, checkpoint: str) -> dict[int, Position]:
        path = self._position_file(checkpoint)
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no data position for process {self.args.process_index}. Resume with as many "
                "processes as the run had."
            )
        saved = torch.load(path, weights_only=True)
        if saved["workers"] != self.args.dataloader_num_workers or saved["batch_size"] != self._train_batch_size:
            raise ValueError(
                f"{checkpoint} was written with {saved['workers']} workers and batches of {saved['batch_size']}, and "
                f"the run has {self.args.dataloader_num_workers} and {self._train_batch_size}: the stream's position "
                "would not fit. Resume with the same."
            )
        return {position["worker"]: Position(**position) for position in saved["positions"]}

    # Checkpoints

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial):
        output = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        staged = output / checkpoints.STAGING / name
        self._staging = staged.parent
        try:
            super()._save_checkpoint(model, trial)
            if self._positions:
                positions = [vars(position) for position in self._positions.values()]
                torch.save(
                    {
                        "workers": self.args.dataloader_num_workers,
                        "batch_size": self._train_batch_size,
                        "positions": positions,
                    },
                    self._position_file(staged),
                )
            if self.is_world_process_zero():
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, RunInfoCallback):
                        callback.write(staged, self.state)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                checkpoints.publish(staged, output / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._staging, ignore_errors=True)
            last = checkpoints.get_last_checkpoint(str(output))
            raise OSError(
                f"{name} could not be written to {output} ({str(error).splitlines()[0]}). "
                + (f"{os.path.basename(last)} is whole. " if last else "There is no earlier checkpoint. ")
                + "Free space on that disk, or set save_total_limit, and go on with --resume_from_checkpoint true."
            ) from error
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            rotate_checkpoints(output_dir=str(output), save_total_limit=self.args.save_total_limit, use_mtime=False)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none: TRL's shows a text model made from "None". `minigpt4 push` writes the card."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        checkpoints.save_trained(self.accelerator.unwrap_model(self.model), folder, state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        peft = hasattr(self.model, "peft_config") and hasattr(self.model, "get_base_model")
        if peft or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            checkpoints.load_trained(self.model, resume_from_checkpoint)

    # Log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._all_tokens and self._logged_at is not None:
            now = time.perf_counter()
            rows = int(self._rows) * self.args.world_size
            logs["samples_per_second"] = round(rows / (now - self._logged_at), 3)
            logs["non_padding_fraction"] = round(float(self._real_tokens) / self._all_tokens, 4)
            self._real_tokens, self._all_tokens, self._rows, self._logged_at = 0, 0, 0, now
        super().log(logs, start_time)


class StageSFTTrainer(StageTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer`, whose loss is computed where labels are, for MiniGPT-4 and LLaVA."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # TRL puts all that learns into bf16 beside quantised weights, where a projection's small steps are lost.
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and "modules_to_save" in name:
                parameter.data = parameter.data.float()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        TRL's loss, and on a CPU the model's own where logits are at labels alone.

        TRL's head computes them twice to save memory, and is the slower one there (docs/benchmarks.md). Its
        metrics of entropy and accuracy are left out then.
        """
        if POSITIONS not in inputs or self.accelerator.device.type != "cpu" or self.args.loss_type != "nll":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False  # packed rows must not see each other
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class StageTrainer(StageTrainerMixin, Trainer):
    """transformers' `Trainer`, for models whose own loss is needed, such as BLIP-2 with its encoder–decoder."""


class ThroughputBar(ProgressCallback):
    """transformers' bar, with samples per second and the share of positions that rows take."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "samples_per_second" in (logs or {}):
            share = f"{logs['non_padding_fraction']:.0%} real tokens"
            self.training_bar.set_postfix_str(f"{logs['samples_per_second']:.3g} samples/s, {share}")


def require_rows(dataset: Any) -> None:
    """
    Raises:
        ValueError: for a data set without rows.
    """
    try:
        next(iter(dataset))
    except StopIteration:
        raise ValueError(
            "The source has no usable row, so there is nothing to train on. Check it with `minigpt4 data check`."
        ) from None
