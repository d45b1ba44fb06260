"""The model without a head, as `AutoModel` loads it and as serving engines build it."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from transformers_minigpt4 import MiniGPT4Model


def test_no_weight_of_a_checkpoint_is_ignored_by_an_engine(tiny_checkpoint):
    """vLLM builds the base model from the config, and loads no weight that matches the patterns it finds there."""
    base = AutoModel.from_config(AutoConfig.from_pretrained(tiny_checkpoint))
    patterns = base._keys_to_ignore_on_load_unexpected or ()
    names = load_file(f"{tiny_checkpoint}/model.safetensors")
    assert "lm_head.weight" in names
    assert not [name for name in names for pattern in patterns if re.search(pattern, name)]


@pytest.mark.parametrize("auto_class", [AutoModel, MiniGPT4Model])
def test_the_base_of_a_full_checkpoint_loads_without_a_word(auto_class, tiny_checkpoint, capfd):
    base, info = auto_class.from_pretrained(tiny_checkpoint, output_loading_info=True)
    assert type(base) is MiniGPT4Model
    assert not any(info.values())
    output = capfd.readouterr()
    assert "lm_head" not in output.out + output.err
    full = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).model
    assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), full.state_dict().values(), strict=True))


def test_the_base_alone_saves_and_loads(tiny_checkpoint, tmp_path):
    base = AutoModel.from_pretrained(tiny_checkpoint)
    base.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), again.state_dict().values(), strict=True))
