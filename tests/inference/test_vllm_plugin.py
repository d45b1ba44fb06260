"""What vLLM loads of this package; `tests/test_vllm.py` runs vLLM itself."""

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from transformers_minigpt4.inference.vllm_plugin import end_at_stop_strings, register


class Parameters:
    """As vLLM's `SamplingParams` in what the plugin touches."""

    def __init__(self, stop=None, ignore_eos=False, detokenize=True):
        self.stop, self.ignore_eos, self.detokenize = stop, ignore_eos, detokenize
        self.seen = []

    def update_from_generation_config(self, generation_config, eos_token_id=None):
        self.seen.append((generation_config, eos_token_id))


@pytest.fixture
def parameters():
    return type("Parameters", (Parameters,), dict(vars(Parameters)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["###"]),
        ({"stop": ["!"]}, ["!", "###"]),
        ({"stop": "###"}, ["###"]),
        ({"ignore_eos": True}, None),
        ({"detokenize": False}, None),
    ],
)
def test_requests_end_at_the_stop_strings_of_the_checkpoint(parameters, processor, given, expected):
    end_at_stop_strings(parameters)
    end_at_stop_strings(parameters)
    request = parameters(**given)
    config = processor.get_generation_config().to_diff_dict()  # as vLLM reads it
    request.update_from_generation_config(config, 2)
    assert request.stop == expected
    assert request.seen == [(config, 2)]


def test_other_models_are_left_alone(parameters):
    end_at_stop_strings(parameters)
    request = parameters(stop=["!"])
    request.update_from_generation_config({"eos_token_id": 2})
    assert request.stop == ["!"]


def test_the_entry_point_registers_the_architecture(parameters, tiny_checkpoint, monkeypatch):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["transformers_minigpt4"].partition(":")
    assert getattr(import_module(module), name) is register
    models = {}
    vllm = ModuleType("vllm")
    vllm.SamplingParams = parameters
    vllm.ModelRegistry = type("ModelRegistry", (), {"register_model": models.__setitem__})
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    register()
    assert list(models) == ["MiniGPT4ForConditionalGeneration"]
    request = parameters()
    request.update_from_generation_config({"stop": ["###"]})
    assert request.stop == ["###"]
