"""Stops a run that cannot succeed, with the likely cause and what to do."""

import math

import torch
from transformers import TrainerCallback

from transformers_minigpt4.data.schema import Row

from .collator import IGNORED, Batch, Collator


NEAR = 0.3  # nats below ln(vocabulary) at which a first loss counts as that of guessing


class TrainingError(RuntimeError):
    """A run that was stopped because it cannot succeed; the message names the cause and what to do."""


class LabelsRequired:
    """
    Wraps any collator and refuses a batch that has nothing to learn, whose loss would silently be zero.

    Args:
        collator (`Callable`): The trainer's own.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, examples: list[Row]) -> Batch:
        batch = self.collator(examples)
        labels = batch.get("labels")
        if labels is not None and not bool((labels != IGNORED).any()):
            raise TrainingError(
                f"All labels of a batch of {len(examples)} rows are masked, so there is nothing to learn from it. "
                "Likely causes: answers that are empty or were cut off with max_length, or a chat template that "
                "marks no answers. Look at what the collator makes of a few rows."
            )
        return batch


class SanityCheckCallback(TrainerCallback):
    """
    Watches the first loss, NaN and infinity, gradients of frozen parameters, and streams without rows.

    Batches without labels are refused by [`LabelsRequired`], which every trainer of this package has.

    Args:
        check_first_loss (`bool`, *optional*, defaults to `True`):
            Stop when the first loss is that of guessing. A working language model is far below ln(vocabulary) on
            captions whatever the projector does; 10.375 with 32,000 words is the symptom of broken weights or dtype
            that users of the authors' code met. Switch it off for random language models.
    """

    def __init__(self, check_first_loss: bool = True) -> None:
        self.check_first_loss = check_first_loss
        self.learning: set[str] = set()
        self.started_at = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.started_at = state.global_step
        self.learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not self.learning:
            raise TrainingError("No parameter requires gradients, so nothing would be learned. Prepare a stage first.")

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = []
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            if name not in self.learning:
                raise TrainingError(
                    f"The frozen parameter {name} received a gradient at step {state.global_step + 1}: something "
                    "called requires_grad_ after the stage was prepared. Prepare the stage last, just before the "
                    "trainer."
                )
            gradients.append(parameter.grad)
        if args.fp16 or not gradients:  # the gradient scaler skips such steps and lowers its scale
            return
        if not all(bool(torch.isfinite(norm)) for norm in _norms(gradients)):
            raise TrainingError(
                f"NaN or infinity in the gradients of step {state.global_step + 1}; the weights are still those of "
                "the step before. Likely causes: a learning rate too high, or frozen modules in fp16 that "
                "overflow. Lower learning_rate, or load the model with dtype=bfloat16, and resume from the last "
                "checkpoint."
            )

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss is {loss} at step {state.global_step}. Likely causes: a learning rate too high, or "
                "modules in fp16 that overflow. Lower learning_rate, or load the model with dtype=bfloat16, and "
                "resume from the last checkpoint."
            )
        if self.check_first_loss and state.global_step == 1 and self.started_at == 0:
            vocabulary = model.config.get_text_config().vocab_size
            if loss > math.log(vocabulary) - NEAR:
                raise TrainingError(
                    f"The first loss is {loss:.3f}, and guessing among {vocabulary:,} words gives "
                    f"{math.log(vocabulary):.3f}, so the language model is no better than chance. Its weights are "
                    "missing or wrong (delta weights not added?), its dtype overflows, or the answers are in words "
                    "that it never saw. `minigpt4 verify` checks its weights; if the model is random, or new to such "
                    "words, on purpose, set check_first_loss: false (--check-first-loss false)."
                )

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step == 0:
            raise TrainingError(
                "The source gave not a single complete batch, so there was no step. Check it with `minigpt4 data "
                "check`; it needs at least as many shards as processes times dataloader_num_workers."
            )


def _norms(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_device.setdefault(gradient.device, []).append(gradient)
    return [torch.stack([torch.linalg.vector_norm(g.float()) for g in group]).sum() for group in by_device.values()]
