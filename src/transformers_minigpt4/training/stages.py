"""What a stage of training changes: the parts that learn, and the proof that everything else stands still."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Attribute paths of each part, from the generation class, in MiniGPT-4, LLaVA and BLIP-2; a model has some of them.
PARTS: dict[str, tuple[str, ...]] = {
    "projector": ("model.multi_modal_projector", "language_projection"),
    "qformer": ("model.qformer", "model.query_tokens", "qformer", "query_tokens"),
    "language_model": ("model.language_model", "language_model", "lm_head"),
}
LORA = "lora"  # PEFT adapters on the language model; the trainer adds them, or they are there already


def prepare_stage(model: PreTrainedModel, train: Iterable[str] = ("projector",)) -> dict[str, int]:
    """
    Makes the named parts learn and freezes everything else, in place.

    Frozen modules stay in eval mode during `model.train()`, so that no dropout acts in them. They get no gradients,
    and no optimizer state, because transformers' trainer leaves out what requires no gradient.

    Args:
        model (`PreTrainedModel`):
            MiniGPT-4, or transformers' `LlavaForConditionalGeneration` or `Blip2ForConditionalGeneration`.
        train (`Iterable[str]`, *optional*, defaults to `("projector",)`):
            Names out of `projection`, `qformer` (with its queries), `language_model` and `lora`.

    Returns:
        `dict[str, int]`: The trainable parameters by name, with the number of their values.

    Raises:
        ValueError: for a part that does not exist, or that this model does not have.
    """
    parts = [train] if isinstance(train, str) else list(train)
    unknown = sorted(set(parts) - set(PARTS) - {LORA})
    if unknown or not parts:
        raise ValueError(
            f"A stage cannot train {', '.join(unknown) or 'nothing'}. Name one or more of {', '.join([*PARTS, LORA])}."
        )
    if LORA in parts and "language_model" in parts:
        raise ValueError(
            "A stage trains either the language model itself or LoRA adapters on it, not both. Drop one of the two."
        )
    model.requires_grad_(False)
    learning: list[nn.Module] = []
    for part in parts:
        found = (
            [module for name, module in model.named_modules() if "lora_" in name]
            if part == LORA
            else [value for path in PARTS[part] if (value := _attribute(model, path)) is not None]
        )
        if not found and part != LORA:  # SFTTrainer adds adapters to a model that is prepared already
            raise ValueError(f"{type(model).__name__} has no {part} to train. Take it out of the stage's parts.")
        for value in found:
            value.requires_grad_(True)
            if isinstance(value, nn.Module):
                learning.append(value)
    if _is_quantized(model) and "language_model" in parts:
        raise ValueError(
            "The language model is quantised, and quantised weights cannot learn. Train LoRA adapters on it instead."
        )
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
    Replaces `model.train`, so that it puts the modules in `learning` alone into training mode.

    Three further kinds of modules say `training`, without any dropout of frozen parts:
    the model and its base model, because trainers and the length check read it there; LoRA's own modules; and layers
    that recompute their activations, since transformers does so only in training mode (their children stay in eval).

    Args:
        model (`nn.Module`): The model, not yet wrapped for distribution.
        learning (`list[nn.Module]`): Modules of it whose subtrees train.
    """
    model._learning_modules = list(learning)  # type: ignore[assignment]
    model.train = _train.__get__(model)  # type: ignore[method-assign]
    model.train(model.training)


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    nn.Module.train(self, False)
    if not mode:
        return self
    self.training = True
    base = getattr(self, "model", None)
    if isinstance(base, nn.Module):
        base.training = True
    for module in self._learning_modules:  # type: ignore[union-attr]
        module.train(True)
    for name, module in self.named_modules():
        recomputes = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        if "lora_" in name or (recomputes and not getattr(module, "dropout", 0)):
            module.training = True
    return self


def touch_trainable(model: PreTrainedModel, whole_tower: bool = False) -> torch.utils.hooks.RemovableHandle | None:
    """
    Connects the trainable parts in front of the language model to the output of batches without images.

    Such a batch would otherwise have no gradient at all (one process), or leave a rank out of the others' reduction
    (several). The contribution is zero to the last bit.

    Args:
        model (`PreTrainedModel`): A prepared model, not yet wrapped for distribution.
        whole_tower (`bool`, *optional*, defaults to `False`):
            Send a blank image through tower, Q-Former and projection. Needed where parameters are sharded over ranks
            (FSDP, ZeRO-3), which gather them module by module, all ranks together.

    Returns:
        The hook's handle, or `None` for models that cannot run without images.
    """
    base = getattr(model, "model", None)
    if not isinstance(base, nn.Module) or not hasattr(base, "multi_modal_projector"):
        return None

    def embed_with_zero(module: nn.Module, args, kwargs):
        input_ids = kwargs.get("input_ids")
        if input_ids is None or not torch.is_grad_enabled():
            return None
        if kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs") is not None:
            return None
        # Before the language model, where other ranks run their towers: sharded layers must be gathered in one order.
        zero = _tower_zero(module, input_ids.device) if whole_tower else _parameter_zero(module)
        if zero is None:
            return None
        embeddings = module.get_input_embeddings()(input_ids)
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embeddings + zero.to(embeddings)}

    return base.register_forward_pre_hook(embed_with_zero, with_kwargs=True)


def _tower_zero(module: nn.Module, device: torch.device) -> torch.Tensor:
    """Zero, out of a blank image's features."""
    size = getattr(module.config, "image_height_width", None)
    if size is None:
        side = module.config.vision_config.image_size
        size = (side, side) if isinstance(side, int) else side
    features = module.get_image_features(torch.zeros((1, 3, *size), device=device), return_dict=True).pooler_output
    return (features if isinstance(features, torch.Tensor) else torch.cat(list(features))).sum() * 0


def _parameter_zero(module: nn.Module) -> torch.Tensor | None:
    """Zero, out of one value of each learning parameter in front of the language model."""
    parts = (getattr(module, name, None) for name in ("multi_modal_projector", "qformer"))
    parameters = [p for part in parts if part is not None for p in part.parameters() if p.requires_grad]
    queries = getattr(module, "query_tokens", None)
    if queries is not None and queries.requires_grad:
        parameters.append(queries)
    if not parameters:
        return None
    return torch.stack([parameter.reshape(-1)[0].float() for parameter in parameters]).sum() * 0


def _attribute(model: nn.Module, path: str) -> nn.Module | nn.Parameter | None:
    value = model
    for name in path.split("."):
        value = getattr(value, name, None)  # type: ignore[assignment]
        if value is None:
            return None
    return value


def _is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))
