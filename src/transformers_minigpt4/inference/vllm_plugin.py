"""
What vLLM loads of this package in each of its processes: the entry point `vllm.general_plugins`.

vLLM builds the model through its Transformers backend. It has no code for MiniGPT-4, here or there.
"""

from collections.abc import Mapping
from functools import wraps
from typing import Any

from transformers_minigpt4 import auto


def register() -> None:
    """
    Makes vLLM load MiniGPT-4 without `trust_remote_code`, and end answers where `generate` ends them.

    May be called repeatedly.
    """
    from vllm import ModelRegistry, SamplingParams

    auto.register()
    ModelRegistry.register_model(
        auto.MiniGPT4ForConditionalGeneration.__name__,
        "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM",
    )
    end_at_stop_strings(SamplingParams)


def end_at_stop_strings(parameters: type[Any]) -> None:
    """
    Adds the stop strings of a checkpoint's `generation_config.json` to those of each request.

    vLLM (0.32) takes end tokens from that file, and no stop strings. `###` after a word consists of two tokens, which
    cannot be end tokens. Requests with `ignore_eos` pass the stop strings too, as they pass the end tokens.

    Args:
        parameters (`type`): vLLM's `SamplingParams`, whose method is replaced, once.
    """
    original = parameters.update_from_generation_config
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def update(self: Any, generation_config: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        original(self, generation_config, *args, **kwargs)
        if self.detokenize and not self.ignore_eos:
            known = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
            self.stop = list(dict.fromkeys([*known, *(generation_config.get("stop") or [])]))

    parameters.update_from_generation_config = update
