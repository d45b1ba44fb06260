"""TRL's and transformers' trainers with what the stages need: schedule, small complete checkpoints, exact resume."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from trl import SFTTrainer

from transformers_minigpt4.utils.text import first_line

from . import checkpoints
from .arguments import StageConfig, check_stream
from .collator import Batch, Collator
from .evaluation import EvaluationMixin
from .loss import POSITIONS
from .progress import TrainingProgress
from .resume_files import read_saved
from .run_info import RunInfoCallback
from .run_page import RunPageCallback
from .sanity_checks import LabelsRequired
from .schedule import get_minigpt4_schedule
from .stages import touch_trainable
from .stream import POSITION, Position, PositionedStream, StreamEpochs, plain_worker_error, stream_loader
from .throughput import ThroughputCallback


class StageTrainerMixin(EvaluationMixin):
    """
    Goes in front of a trainer class, see [`StageSFTTrainer`] and [`StageTrainer`]; its `args` are a [`StageConfig`],
    and it takes `epoch_rows`, the rows of an epoch of a stream, if they are known.

    - `args.min_lr` selects the authors' schedule.
    - Checkpoints hold the trained modules, optimizer, schedule, random states and data position; they appear complete
      under their name, or not at all.
    - A streaming dataset is split over ranks and workers, has no end, and resumes exactly where a run stopped.
    - Batches without images train along (`touch_trainable`).
    - `eval_loss` is a mean over all tokens of the held-out rows, see [`EvaluationMixin`].
    """

    args: StageConfig
    model: PreTrainedModel
    lr_scheduler: LambdaLR | None
    data_collator: Collator

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        epoch_rows = kwargs.pop("epoch_rows", None)
        dataset = kwargs.get("train_dataset")
        if dataset is not None:
            require_rows(dataset)
        self._positions: dict[int, Position] = {}
        self._staging: Path | None = None
        self._authors_schedule: LambdaLR | None = None
        super().__init__(*args, **kwargs)
        if isinstance(self.train_dataset, IterableDataset):
            check_stream(self.args)
        self._given_schedule = self.lr_scheduler
        self.data_collator = LabelsRequired(self.data_collator)
        self.throughput = ThroughputCallback()
        self.callback_handler.callbacks.insert(0, self.throughput)  # reporters and the progress come after it
        if isinstance(self.train_dataset, IterableDataset):
            self.callback_handler.callbacks.insert(0, StreamEpochs(epoch_rows))
        self.progress = TrainingProgress(len(dataset) if isinstance(dataset, Dataset) else epoch_rows)
        if self.pop_callback(ProgressCallback) or self.pop_callback(PrinterCallback):  # notebooks have their own
            self.add_callback(self.progress)
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        touch_trainable(model, full_tower=sharded)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """See [`~Trainer.train`]. A folder that holds checkpoints is resumed or refused, never overwritten."""
        output = str(self.args.output_dir)
        checkpoint = checkpoints.resolve_resume(output, resume_from_checkpoint)
        if self.is_world_process_zero():
            shutil.rmtree(Path(output) / checkpoints.STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._positions = {}
        if checkpoint is not None and isinstance(self.train_dataset, IterableDataset):
            self._positions = self._load_positions(checkpoint)
        self.lr_scheduler = self._given_schedule  # one of an earlier call has run out
        try:
            return super().train(checkpoint, *args, **kwargs)
        except KeyboardInterrupt:
            self._write_page("interrupted")
            raise
        except Exception as error:
            plain = plain_worker_error(error)
            self._write_page(f"stopped by an error: {first_line(plain or error)}")
            if plain is None:
                raise
            raise plain from error
        finally:
            self.progress.close()

    def _write_page(self, status: str) -> None:
        """The page of a run that did not reach its end, if it took a step and the page can be written."""
        if not self.state.global_step or not self.is_world_process_zero():
            return
        step = f"at step {self.state.global_step:,} of {self.state.max_steps:,}"
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RunPageCallback):
                with contextlib.suppress(OSError, ValueError):
                    callback.write(str(self.args.output_dir), self.state, f"{status}, {step}")

    def end(self) -> None:
        """
        Finishes the trackers and destroys the process group, as [`~Trainer.end`] of transformers from 5.18 on does.

        torch's reducer goes before the process group. As the group's last owner, the reducer would wait for one of its
        threads while it holds Python's lock, which that thread may need: the process would never end.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """
        See [`~Trainer.create_scheduler`]; the authors' schedule if `args.min_lr` is set.

        It cannot be passed as `optimizers=`: its optimizer exists only after TRL has added adapters, and transformers
        refuses that argument for models sharded by FSDP.
        """
        if self.args.min_lr is None or self.lr_scheduler not in (None, self._authors_schedule):
            return super().create_scheduler(num_training_steps, optimizer)
        # A run that is restarted with a smaller batch (`auto_find_batch_size`) has other steps and another optimizer.
        self.lr_scheduler = self._authors_schedule = get_minigpt4_schedule(
            optimizer or self.create_optimizer(),
            num_training_steps,
            self.args.get_warmup_steps(num_training_steps),
            min_lr=self.args.min_lr,
            warmup_start_lr=self.args.warmup_start_lr,
            iters_per_epoch=self.args.iters_per_epoch,
        )
        return self.lr_scheduler

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        """See [`~Trainer.set_initial_training_values`]; a stream is one epoch, after whose steps a run is complete."""
        epochs, *values = super().set_initial_training_values(args, dataloader)
        return (1 if isinstance(self.train_dataset, IterableDataset) else epochs, *values)

    # Data position

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        stream = PositionedStream(
            self.train_dataset,
            self.args.train_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            start=self._positions,
        )
        return stream_loader(stream, self.data_collator, self.args)

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        position = inputs.pop(POSITION, None)
        if position is not None:
            self._positions = {**self._positions, position.worker: position}
        self.throughput.count(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _position_file(self, checkpoint: str | os.PathLike[str]) -> Path:
        return Path(checkpoint) / f"data_position_{self.args.process_index}.pt"

    def _save_positions(self, checkpoint: Path) -> None:
        positions = [vars(position) for position in self._positions.values()]
        shape = {"workers": self.args.dataloader_num_workers, "batch_size": self.args.train_batch_size}
        torch.save({**shape, "positions": positions}, self._position_file(checkpoint))

    def _load_positions(self, checkpoint: str) -> dict[int, Position]:
        path = self._position_file(checkpoint)
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no data position for process {self.args.process_index}. Resume with as many "
                "processes as the run had."
            )
        saved = read_saved(path)
        workers, batch_size = self.args.dataloader_num_workers, self.args.train_batch_size
        if saved["workers"] != workers or saved["batch_size"] != batch_size:
            raise ValueError(
                f"{checkpoint} was written with {saved['workers']} workers and batches of {saved['batch_size']}, and "
                f"the run has {workers} and {batch_size}: the stream's position would not fit. Resume with the same."
            )
        return {position["worker"]: Position(**position) for position in saved["positions"]}

    # Checkpoints: private methods of `Trainer`, see "Private names of other packages" in docs/architecture.md

    def _get_output_dir(self, trial: object) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        output = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        staged = output / checkpoints.STAGING / name
        self._staging = staged.parent
        try:
            super()._save_checkpoint(model, trial)
            if self._positions:
                self._save_positions(staged)
            self._name_best_checkpoint(staged, output)
            if self.is_world_process_zero():
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, RunInfoCallback):
                        callback.write(staged, self.state)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                checkpoints.publish(staged, output / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            last = checkpoints.get_last_checkpoint(str(output))
            raise OSError(
                f"{name} could not be written to {output} ({first_line(error)}). "
                + (f"{os.path.basename(last)} is complete. " if last else "There is no earlier checkpoint. ")
                + "Free space on that disk, or set save_total_limit, and resume with --resume-from-checkpoint true."
            ) from error
        finally:
            self._staging = None
            if self.is_world_process_zero():
                shutil.rmtree(staged.parent, ignore_errors=True)  # of a save that was interrupted
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            rotate_checkpoints(
                output_dir=str(output),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )

    def _name_best_checkpoint(self, staged: Path, output: Path) -> None:
        """Records where the best checkpoint will be, which transformers looks for next to the staged one."""
        best = f"checkpoint-{self.state.best_global_step}"
        if staged.name == best or (output / best).is_dir():
            self.state.best_model_checkpoint = str(output / best)
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Writes none: TRL's describes a text model trained from "None". `minigpt4 push` writes the card."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or str(self.args.output_dir)
        checkpoints.save_trained(self.accelerator.unwrap_model(self.model), folder, state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            checkpoints.load_trained(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            checkpoints.load_trained(self.model, str(self.state.best_model_checkpoint))


class StageSFTTrainer(StageTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer`, with the loss computed only where labels are, for MiniGPT-4 and LLaVA."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # TRL converts all trainable parameters of quantized models to bf16, but a projector's small steps need fp32.
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and "modules_to_save" in name:
                parameter.data = parameter.data.float()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        TRL's loss, or on a CPU the model's own if logits are at labels only.

        TRL's head computes them twice to save memory, and is slower there (docs/guides/fast-training.md). Its metrics
        of entropy and accuracy are left out then.
        """
        if POSITIONS not in inputs or self.accelerator.device.type != "cpu" or self.args.loss_type != "nll":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False  # packed rows must not see each other
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class StageTrainer(StageTrainerMixin, Trainer):
    """transformers' `Trainer`, for models whose own loss is needed, such as BLIP-2 with its encoder–decoder."""


def require_rows(dataset: Dataset | IterableDataset) -> None:
    """
    Raises:
        ValueError: for a dataset without rows.
    """
    if next(iter(dataset), None) is None:
        raise ValueError(
            "The source has no usable row, so there is nothing to train on. Check it with `minigpt4 data check`."
        )
