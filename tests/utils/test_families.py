"""The table of model families against the models themselves."""

import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration

from transformers_minigpt4 import (
    LlavaLinearConfig,
    LlavaLinearForConditionalGeneration,
    MiniGPT4Config,
    MiniGPT4ForConditionalGeneration,
)
from transformers_minigpt4.utils.families import (
    BLIP2,
    FAMILIES,
    LLAVA,
    LORA,
    MINIGPT4,
    OTHER,
    TRAINABLE_MODULES,
    family_of,
)


MODELS = {
    "minigpt4": (MiniGPT4ForConditionalGeneration, MiniGPT4Config),
    "llava": (LlavaForConditionalGeneration, LlavaConfig),
    "llava_linear": (LlavaLinearForConditionalGeneration, LlavaLinearConfig),
    "blip-2": (Blip2ForConditionalGeneration, Blip2Config),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_paths_of_a_family_are_those_of_its_model(model_type):
    model_class, config_class = MODELS[model_type]
    with torch.device("meta"):
        model = model_class(config_class())
    family = family_of(model.config)
    assert family is FAMILIES[model_type]
    known = dict(model.named_modules()) | dict(model.named_parameters())
    for name, paths in family.modules.items():
        assert name in TRAINABLE_MODULES and name != LORA
        assert all(path in known for path in paths), name
    base = model.base_model
    assert all(hasattr(base, name) for name in family.image_modules)


def test_lookups():
    found = [family_of(config) for config in (MiniGPT4Config(), LlavaConfig(), Blip2Config())]
    assert found == [MINIGPT4, LLAVA, BLIP2]
    assert family_of(object()) is OTHER
