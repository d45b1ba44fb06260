"""Prepares a model for a stage: which modules train, and that everything else stays frozen."""

from collections.abc import Iterable
from types import MethodType
from typing import Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from transformers_minigpt4.utils.families import LANGUAGE_MODEL, LORA, PROJECTOR, TRAINABLE_MODULES, family_of

from .collator import Batch


logger = logging.get_logger(__name__)


class ImageFeatures(Protocol):
    """Projected features: `(images, K, D)`, or a list of one tensor per image."""

    pooler_output: torch.Tensor | list[torch.Tensor]


class ImageEncoder(Protocol):
    """A model that encodes and projects images, in transformers' way."""

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: object) -> ImageFeatures: ...


def check_modules(names: list[str], quantized: bool = False) -> None:
    """
    Checks the names of modules to train.

    Args:
        names (`list[str]`): Out of `TRAINABLE_MODULES`.
        quantized (`bool`, *optional*, defaults to `False`): Whether the language model is quantized.

    Raises:
        ValueError: for no name or an unknown one, and for modules that cannot train together or at all.
    """
    unknown = sorted(set(names) - set(TRAINABLE_MODULES))
    if "projection" in unknown:
        raise ValueError("In trainable_modules, `projection` is called `projector` now. Rename it.")
    if unknown or not names:
        raise ValueError(
            f"trainable_modules: {', '.join(unknown) or 'nothing'} cannot be trained. Name one or more of "
            f"{', '.join(TRAINABLE_MODULES)}."
        )
    if LORA in names and LANGUAGE_MODEL in names:
        raise ValueError(
            "trainable_modules: lora and language_model exclude each other: a stage trains either the language model "
            "itself or LoRA adapters on it. Drop one of the two."
        )
    if quantized and LANGUAGE_MODEL in names:
        raise ValueError(
            "trainable_modules: language_model and a quantized language model exclude each other, because quantized "
            "weights cannot learn. Train lora instead."
        )


def prepare_stage(model: PreTrainedModel, train: str | Iterable[str] = (PROJECTOR,)) -> dict[str, int]:
    """
    Makes the named modules trainable and freezes everything else, in place.

    Frozen modules stay in eval mode during `model.train()`, so that no dropout acts in them. They get no gradients,
    and no optimizer state, because transformers' trainer leaves out what requires no gradient.

    Args:
        model (`PreTrainedModel`):
            MiniGPT-4, or transformers' `LlavaForConditionalGeneration` or `Blip2ForConditionalGeneration`.
        train (`Iterable[str]`, *optional*, defaults to `("projector",)`):
            Names out of `projector`, `qformer` (with its queries), `language_model` and `lora`: PEFT adapters on the
            language model, which the trainer adds, or which are there already.

    Returns:
        `dict[str, int]`: The trainable parameters by name, with the number of their values.

    Raises:
        ValueError: for a module that does not exist, or that this model does not have.
    """
    names = [train] if isinstance(train, str) else list(train)
    check_modules(names, quantized=_is_quantized(model))
    paths = family_of(model.config).modules
    model.requires_grad_(False)
    learning: list[nn.Module] = []
    for name in names:
        if name == LORA:
            found = [module for path, module in model.named_modules() if "lora_" in path]
        else:
            found = [value for path in paths.get(name, ()) if (value := _attribute(model, path)) is not None]
        if not found and name != LORA:  # SFTTrainer adds adapters to a model that is prepared already
            raise ValueError(
                f"{type(model).__name__} has no {name} to train. Remove it from the stage's trainable_modules."
            )
        for value in found:
            value.requires_grad_(True)
            if isinstance(value, nn.Module):
                learning.append(value)
    freeze_modes(model, learning)
    trainable = trainable_parameters(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, count in trainable.items():
        logger.info(f"trains: {name} ({count:,})")
    logger.info(f"{sum(trainable.values()):,} of {total:,} parameters train.")
    return trainable


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """Names of the parameters that require gradients, with the number of their values."""
    return {name: value.numel() for name, value in model.named_parameters() if value.requires_grad}


def freeze_modes(model: nn.Module, learning: list[nn.Module]) -> None:
    """
    Replaces `model.train`, so that it puts only the modules in `learning` into training mode.

    Three further kinds of modules get `training = True`, without any dropout in frozen modules: the model and its base
    model, because trainers and the length check read it there; LoRA's own modules; and layers that recompute their
    activations, since transformers does so only in training mode (their children stay in eval mode).

    Args:
        model (`nn.Module`): The model, not yet wrapped for distribution.
        learning (`list[nn.Module]`): Modules of it whose subtrees train.
    """
    # A bound method and an attribute of the model, so that copies of the model have their own.
    model.learning_modules = list(learning)  # type: ignore[assignment]  # stubs allow modules and tensors only
    model.train = MethodType(_train, model)  # type: ignore[method-assign]
    model.train(model.training)


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    nn.Module.train(self, False)
    if not mode:
        return self
    self.training = True
    base = getattr(self, "model", None)
    if isinstance(base, nn.Module):
        base.training = True
    for module in getattr(self, "learning_modules", []):
        module.train(True)
    for name, module in self.named_modules():
        recomputes = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        if "lora_" in name or (recomputes and not getattr(module, "dropout", 0)):
            module.training = True
    return self


def touch_trainable(model: PreTrainedModel, full_tower: bool = False) -> torch.utils.hooks.RemovableHandle | None:
    """
    Connects the trainable modules in front of the language model to the output of batches without images.

    Such a batch would otherwise have no gradient at all (one process), or exclude a rank from the others' reduction
    (several). The contribution is exactly zero.

    Args:
        model (`PreTrainedModel`): A prepared model, not yet wrapped for distribution.
        full_tower (`bool`, *optional*, defaults to `False`):
            Send a blank image through tower, Q-Former and projector. Needed if parameters are sharded over ranks
            (FSDP, ZeRO-3), which gather them module by module, all ranks together.

    Returns:
        The hook's handle, or `None` for models that cannot run without images.
    """
    base = getattr(model, "model", None)
    if not isinstance(base, PreTrainedModel) or not hasattr(base, "multi_modal_projector"):
        return None

    def embed_with_zero(
        module: nn.Module, args: tuple[object, ...], kwargs: Batch
    ) -> tuple[tuple[object, ...], Batch] | None:
        input_ids = kwargs.get("input_ids")
        if input_ids is None or not torch.is_grad_enabled():
            return None
        if kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs") is not None:
            return None
        # Before the language model, when other ranks run their towers: sharded layers must be gathered in one order.
        zero = _tower_zero(base, input_ids.device) if full_tower else _parameter_zero(base)
        if zero is None:
            return None
        embeddings = base.get_input_embeddings()(input_ids)
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embeddings + zero.to(embeddings)}

    return base.register_forward_pre_hook(embed_with_zero, with_kwargs=True)


def _tower_zero(base: PreTrainedModel, device: torch.device) -> torch.Tensor:
    """Zero, from a blank image's features."""
    size = getattr(base.config, "image_height_width", None)
    if size is None:
        side = base.config.vision_config.image_size
        size = (side, side) if isinstance(side, int) else side
    pixels = torch.zeros((1, 3, *size), device=device)
    output = cast(ImageEncoder, base).get_image_features(pixels, return_dict=True)
    features = output.pooler_output
    return (features if isinstance(features, torch.Tensor) else torch.cat(features)).sum() * 0


def _parameter_zero(base: PreTrainedModel) -> torch.Tensor | None:
    """Zero, from one value of each trainable parameter in front of the language model."""
    modules = ("multi_modal_projector", "qformer", "query_tokens")
    parameters = [p for name, p in base.named_parameters() if p.requires_grad and name.split(".")[0] in modules]
    if not parameters:
        return None
    return torch.stack([parameter.reshape(-1)[0].float() for parameter in parameters]).sum() * 0


def _attribute(model: nn.Module, path: str) -> nn.Module | nn.Parameter | None:
    value: nn.Module | nn.Parameter | None = model
    for name in path.split("."):
        value = getattr(value, name, None)
        if value is None:
            return None
    return value


def _is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))
