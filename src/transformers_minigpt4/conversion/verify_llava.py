"""What `verify` does for LLaVA alone, with either projector: loading, prompts, and the tower's features."""

from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
)

from transformers_minigpt4.processing.processing_llava import LlavaPromptProcessor, check_template

from .checks import Check
from .key_maps import shorten
from .weight_record import FEATURE_SETTINGS, WeightRecord


# The article's; its variant with the last layer has -1, and the authors' `cls_patch` is "full".
_FEATURES = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}


def load_llava(
    checkpoint: str, base: str, dtype: str | torch.dtype, device: str | None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """
    Model and processor of a LLaVA; an adapter is merged into its base.

    Raises:
        OSError, ValueError: for tensors that are missing, unexpected or of another shape, and for another processor.
    """
    processor = AutoProcessor.from_pretrained(base, trust_remote_code=False)
    if not isinstance(processor, LlavaProcessor):
        raise ValueError(f"{base} has no processor of LLaVA, but a {type(processor).__name__}; copy it from its base")
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        base, dtype=dtype, device_map=device, output_loading_info=True, trust_remote_code=False
    )
    model, info = loaded
    for what in ("missing", "unexpected", "mismatched"):
        # Of a mismatched tensor both shapes are given too.
        names = sorted(each if isinstance(each, str) else str(each[0]) for each in info[f"{what}_keys"])
        if names:
            raise ValueError(f"{len(names)} tensors are {what}: {shorten(names, 3)}")
    if checkpoint != base:
        model = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
    return model, processor


def tower_positions(config: PreTrainedConfig) -> int:
    """Positions that an image takes, by the tower's size; `image_seq_length` is wrong in many configs."""
    tower: Any = config.vision_config
    patches = (tower.image_size // tower.patch_size) ** 2
    return int(patches + (config.vision_feature_select_strategy == "full"))


def check_prompt(processor: LlavaProcessor) -> Check:
    """Writes a conversation of two turns, as training and chats do."""
    name = "chat template"
    if isinstance(processor, LlavaPromptProcessor) and processor.has_own_template:
        stops = " ".join(["</s>", *processor.stop_strings])
        return Check(name, "ok", f"{processor.prompt_format}, as its authors write it; answers end at {stops}")
    if not isinstance(processor.chat_template, str):
        advice = "train or convert it with a prompt format such as llava_v1, or set processor.chat_template"
        return Check(name, "warn", "there is none: images can be described, but not talked about", advice)
    try:
        check_template(processor, processor.chat_template)
    except Exception as error:  # whatever a foreign template raises, it is the finding
        advice = "train it with a prompt format of LLaVA's authors, such as llava_v1, which replaces the template"
        return Check(name, "warn", str(error).splitlines()[0], advice)
    return Check(name, "ok", "a template of its own, in which answers are found and images have their places")


def check_features(config: PreTrainedConfig, records: list[WeightRecord], untrained: set[str]) -> Check:
    """Compares which features of the tower the projector gets with the record, or with the article's."""
    name, now = "tower's features", {key: getattr(config, key) for key in FEATURE_SETTINGS}
    layers = config.vision_feature_layer
    depth = int(config.vision_config.num_hidden_layers)
    chosen = [layers] if isinstance(layers, int) else list(layers)
    beyond = [layer for layer in chosen if not -depth - 1 <= layer <= depth]
    if beyond:
        advice = "set vision_feature_layer in config.json; LLaVA was trained with -2, the layer before the last"
        return Check(name, "fail", f"layer {beyond[0]} of a tower that has {depth}", advice)
    recorded = next((record.features for record in records if record.features), None)
    expected = recorded or _FEATURES
    wrong = [f"{key} is {now[key]}, not {value}" for key, value in expected.items() if now[key] != value]
    if not wrong:
        detail = f"layer {layers}, {config.vision_feature_select_strategy}"
        return Check(name, "ok", f"{detail}, as {'recorded' if recorded else 'in the article'}")
    if recorded and "projector" not in untrained:
        advice = "the projector was trained with other features of the tower; set them in config.json as recorded"
        return Check(name, "fail", "; ".join(wrong), advice)
    advice = "right if the projector is trained like this, as in the article's ablation; else set it in config.json"
    return Check(name, "warn", "; ".join(wrong), advice)


__all__ = ["check_features", "check_prompt", "load_llava", "tower_positions"]
