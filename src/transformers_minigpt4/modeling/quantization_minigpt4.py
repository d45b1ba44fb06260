"""4 bits on a CPU: leaves out the layers whose sizes the CPU's kernel of bitsandbytes cannot pack."""

import copy
import re

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from .configuration_minigpt4 import JsonObject, MiniGPT4Config


# On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights at the first forward pass. It takes 32 rows at once
# (`_convert_weight_packed_for_cpu`) and one scale for 64 columns (its block size), and fails where any are left over.
_ROWS, _COLUMNS = 32, 64


def without_odd_layers(model_class: type[PreTrainedModel], config: MiniGPT4Config, options: JsonObject) -> JsonObject:
    """
    The options of `from_pretrained`, with layers excluded from quantization that would fail on the CPU.

    Real models have such layers rarely (SigLIP so400m: 4304 columns), the demo's tiny ones often (96 columns).

    Args:
        model_class (`type`): The class to load.
        config (`MiniGPT4Config`): The checkpoint's.
        options (`dict`): As given; returned as they are unless they ask for 4 bits on a CPU.
    """
    quantization = options.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("load_in_4bit"):
        quantization = BitsAndBytesConfig(**quantization)
    if not isinstance(quantization, BitsAndBytesConfig) or not quantization.load_in_4bit:
        return options
    if not _on_cpu(options.get("device_map")):
        return options
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    odd = [
        re.escape(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module.out_features % _ROWS or module.in_features % _COLUMNS)
    ]
    if not odd:
        return options
    quantization = copy.deepcopy(quantization)
    skipped = quantization.llm_int8_skip_modules
    quantization.llm_int8_skip_modules = [*(["lm_head"] if skipped is None else skipped), *odd]
    return {**options, "quantization_config": quantization}


def _on_cpu(device_map: object) -> bool:
    """Whether everything goes to the CPU, where quantized models are put without an accelerator in any case."""
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    return not torch.accelerator.is_available() or all(str(device) == "cpu" for device in devices)
