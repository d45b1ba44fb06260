"""Configuration of LLaVA with the article's projector, one linear layer, which transformers' LLaVA does not have."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)


# Where transformers finds the code that is saved with every checkpoint.
AUTO_MAP = {
    "AutoConfig": "configuration_llava.LlavaLinearConfig",
    "AutoModel": "modeling_llava.LlavaLinearModel",
    "AutoModelForImageTextToText": "modeling_llava.LlavaLinearForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_llava.LlavaLinearForConditionalGeneration",
    "AutoProcessor": "processing_llava.LlavaPromptProcessor",
}

# As for MiniGPT-4: `transformers serve` and pipelines look for the class in these tables.
for _names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    _names.setdefault("llava_linear", "LlavaLinearForConditionalGeneration")


@strict
class LlavaLinearConfig(LlavaConfig):
    r"""
    Configuration of [`LlavaLinearModel`] and [`LlavaLinearForConditionalGeneration`]: LLaVA as its article has it
    (arXiv 2304.08485), with one linear layer between vision and language.

    It is transformers' [`LlavaConfig`] under another `model_type`; `projector_hidden_act` is not used. Features are
    those of the layer before the last, without the class token: `vision_feature_layer=-2` and
    `vision_feature_select_strategy="default"`. The article's variant with the last layer has
    `vision_feature_layer=-1`, and the authors' `cls_patch` is `vision_feature_select_strategy="full"`.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig
    >>> from transformers_minigpt4 import LlavaLinearConfig

    >>> config = LlavaLinearConfig(vision_config=CLIPVisionConfig(image_size=224, patch_size=14), image_seq_length=256)
    >>> config.vision_feature_layer
    -2
    ```"""

    model_type = "llava_linear"

    # Of the tower's and the language model's own classes; `dict` and `None` only as arguments.
    vision_config: Any = None
    text_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        super().__post_init__(**kwargs)


__all__ = ["LlavaLinearConfig"]
