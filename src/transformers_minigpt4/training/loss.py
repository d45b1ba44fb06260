"""Computes logits only where labels are, whichever head and loss follow the base model."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from transformers_minigpt4.data.schema import Row

from .collator import IGNORED, Batch, Collator


POSITIONS = "label_positions"


@dataclass
class LabeledCollator:
    """
    Wraps a collator and adds which positions of a batch predict a label; for models of [`keep_labeled`].

    transformers' forward projects every position, prompt and padding too. TRL's fused head skips unlabeled ones on
    devices with Triton, and scores all elsewhere.

    Returns (per call): what the collator gives, with `labels` of shape `(1, L + 1)`, which are -100 followed by the L
    labels of the batch, and `label_positions` of shape `(L + 1,)`, the places that predict them in the flattened batch
    (the last one repeated). Heads and losses shift labels by one as usual.
    """

    collator: Collator

    def __call__(self, examples: list[Row]) -> Batch:
        batch = dict(self.collator(examples))
        labels = batch["labels"]
        learned = torch.zeros_like(labels, dtype=torch.bool)
        learned[:, :-1] = labels[:, 1:] != IGNORED
        positions = learned.flatten().nonzero()[:, 0]
        found = labels.flatten()[positions + 1]
        batch["labels"] = torch.cat([found.new_full((1,), IGNORED), found])[None]
        batch[POSITIONS] = torch.cat([positions, positions[-1:]])
        return batch


def keep_image_token_out(model: PreTrainedModel) -> torch.utils.hooks.RemovableHandle:
    """
    Keeps the image token out of the softmax of a model that gives it a share, as transformers' LLaVA does.

    The authors' vocabulary has no image token. In a model of 7B the share is far below rounding, in a tiny one it is
    not.

    Args:
        model (`PreTrainedModel`): One with a head of its own, not yet wrapped for distribution.

    Returns:
        The hook's handle.
    """
    image_token_id = model.config.image_token_id

    def mask(module: nn.Module, args: tuple[object, ...], logits: torch.Tensor) -> torch.Tensor:
        never = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        never[image_token_id] = True
        return logits.masked_fill(never, -10_000.0)

    return model.get_output_embeddings().register_forward_hook(mask)


def keep_labeled(model: PreTrainedModel) -> list[torch.utils.hooks.RemovableHandle]:
    """
    Makes a base model return only the hidden states of `label_positions`, if a batch has them.

    Works with transformers' own loss and with TRL's fused head, because both call the base model and put their head on
    `last_hidden_state`, which then has shape `(1, L + 1, D)`. The model's own forward keeps the image token out of the
    softmax. TRL's head counts it like any other row: it adds log(1 + exp(z - lse)) to the loss of a position, z the
    token's logit (0 for a row of zeros) and lse the log-sum-exp of all others.

    Args:
        model (`PreTrainedModel`): MiniGPT-4 or LLaVA, not yet wrapped for distribution.

    Returns:
        The hooks' handles.
    """
    base = model.base_model
    kept: list[torch.Tensor | None] = []

    def take_positions(module: nn.Module, args: tuple[object, ...], kwargs: Batch) -> tuple[tuple[object, ...], Batch]:
        kept[:] = [kwargs.pop(POSITIONS, None)]
        return args, kwargs

    def gather(module: nn.Module, args: tuple[object, ...], kwargs: Batch, output: BaseModelOutput) -> BaseModelOutput:
        positions = kept.pop() if kept else None
        if positions is not None and output.last_hidden_state is not None:
            hidden_states = output.last_hidden_state  # (B, T, D)
            output.last_hidden_state = hidden_states.flatten(0, 1)[positions][None]  # (1, L + 1, D)
        return output

    return [
        base.register_forward_pre_hook(take_positions, with_kwargs=True),
        base.register_forward_hook(gather, with_kwargs=True),
    ]
