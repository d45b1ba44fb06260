"""Models without their frozen image modules, for training from cached features."""

from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from transformers_minigpt4.modeling.configuration_llava import LlavaLinearConfig
from transformers_minigpt4.modeling.modeling_llava import LlavaLinearForConditionalGeneration
from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from transformers_minigpt4.utils.families import LLAVA, family_of


REMOVABLE = ("vision_tower", "qformer")


class RemovedModule(nn.Module):
    """Takes the place of a removed module, and raises when it is called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: object, **kwargs: object) -> None:
        """
        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"The {self.name} was taken out, because this model trains from cached features. Give it image_features, "
            "or load the complete model."
        )


class TowerlessLlava(LlavaForConditionalGeneration):
    """LLaVA without its vision tower, whose weights are then not loaded."""

    complete_class = LlavaForConditionalGeneration

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)  # in `from_pretrained`, on the meta device: nothing is allocated yet
        remove_tower(self)
        self._keys_to_ignore_on_load_unexpected = {r"(^|\.)vision_tower\."}


class TowerlessLlavaLinear(LlavaLinearForConditionalGeneration):
    """The same for LLaVA with a linear projector."""

    complete_class = LlavaLinearForConditionalGeneration

    def __init__(self, config: LlavaLinearConfig) -> None:
        super().__init__(config)
        remove_tower(self)
        self._keys_to_ignore_on_load_unexpected = {r"(^|\.)vision_tower\."}


# Published checkpoints have older names of weights, which transformers converts by the name of the class.
register_checkpoint_conversion_mapping(TowerlessLlava.__name__, get_checkpoint_conversion_mapping("llava"))


def load_towerless(config: PreTrainedConfig, name: str, **keywords: Any) -> PreTrainedModel:
    """
    `from_pretrained` without vision tower and Q-Former, whose weights are not read.

    Args:
        config (`PreTrainedConfig`): Config of a MiniGPT-4 or of a LLaVA.
        name (`str`): Folder or Hub id.
        keywords: For `from_pretrained`.
    """
    if isinstance(config, LlavaLinearConfig):
        return TowerlessLlavaLinear.from_pretrained(name, **keywords)
    if family_of(config) is LLAVA:
        return TowerlessLlava.from_pretrained(name, **keywords)
    model = MiniGPT4ForConditionalGeneration.from_pretrained(name, image_modules=False, **keywords)
    remove_tower(model)
    return model


def remove_tower(model: PreTrainedModel) -> None:
    """Takes vision tower and Q-Former out of a model, in place; what replaces them raises when it is called."""
    for name in REMOVABLE:
        if hasattr(model.base_model, name):
            setattr(model.base_model, name, RemovedModule(name))


def has_tower(model: PreTrainedModel) -> bool:
    """Whether a model has its vision tower, which [`remove_tower`] and [`load_towerless`] leave out."""
    return not isinstance(getattr(model.base_model, "vision_tower", None), RemovedModule)


@torch.no_grad()
def complete(model: PreTrainedModel, revision: str = "main") -> PreTrainedModel:
    """
    The complete model of one without its tower: as its checkpoint has it, with the weights that `model` trained.

    Args:
        model (`PreTrainedModel`): A model of [`load_towerless`], or of [`remove_tower`].
        revision (`str`, *optional*, defaults to `"main"`): The revision on the Hub that it was loaded from.
    """
    model_class: type[PreTrainedModel] = getattr(model, "complete_class", type(model))
    loaded = model_class.from_pretrained(model.name_or_path, dtype=model.dtype, revision=revision)
    for name, value in model.named_parameters():
        if value.requires_grad:
            loaded.get_parameter(name).copy_(value)
    return loaded
