"""MiniGPT-4 for Hugging Face transformers; importing this package registers it with the Auto classes and pipelines."""

from .auto import register
from .modeling.configuration_minigpt4 import MiniGPT4Config
from .modeling.modeling_minigpt4 import (
    MiniGPT4ForConditionalGeneration,
    MiniGPT4Model,
    MiniGPT4PreTrainedModel,
)
from .processing.pipeline_minigpt4 import MiniGPT4ImageToTextPipeline
from .processing.processing_minigpt4 import MiniGPT4Processor


__version__ = "0.1.0"

__all__ = [
    "MiniGPT4Config",
    "MiniGPT4ForConditionalGeneration",
    "MiniGPT4ImageToTextPipeline",
    "MiniGPT4Model",
    "MiniGPT4PreTrainedModel",
    "MiniGPT4Processor",
]

register()
