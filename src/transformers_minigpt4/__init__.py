"""
MiniGPT-4 for Hugging Face transformers.

Importing this package is cheap: it loads neither torch nor transformers. As soon as transformers is loaded, before or
after it, MiniGPT-4 is registered with the Auto classes, the pipelines and the tables of serving, see `auto.py`.
"""

from .utils.interrupts import handle_interrupts, is_command


if is_command():
    handle_interrupts()  # before the other imports, which take most of a short command's time

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook


if TYPE_CHECKING:
    from .modeling.configuration_llava import LlavaLinearConfig
    from .modeling.configuration_minigpt4 import MiniGPT4Config
    from .modeling.modeling_llava import LlavaLinearForConditionalGeneration, LlavaLinearModel
    from .modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model, MiniGPT4PreTrainedModel
    from .processing.pipeline_minigpt4 import MiniGPT4ImageToTextPipeline
    from .processing.processing_llava import LlavaPromptProcessor
    from .processing.processing_minigpt4 import MiniGPT4Processor


__version__ = "0.1.0"

__all__ = [
    "LlavaLinearConfig",
    "LlavaLinearForConditionalGeneration",
    "LlavaLinearModel",
    "LlavaPromptProcessor",
    "MiniGPT4Config",
    "MiniGPT4ForConditionalGeneration",
    "MiniGPT4ImageToTextPipeline",
    "MiniGPT4Model",
    "MiniGPT4PreTrainedModel",
    "MiniGPT4Processor",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("transformers")  # first, as everybody does: threads then take import locks in one order
    value: object = getattr(importlib.import_module(f"{__name__}.auto"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# What imports transformers and is imported by `auto`. Such a module is incomplete while it loads transformers.
_MODULES = (
    "modeling.checkpoint_checks_minigpt4",
    "modeling.checkpoint_mixin_minigpt4",
    "modeling.configuration_llava",
    "modeling.configuration_minigpt4",
    "modeling.modeling_llava",
    "modeling.modeling_minigpt4",
    "modeling.quantization_minigpt4",
    "modeling.stop_sequences_minigpt4",
    "modeling.trained_modules_minigpt4",
    "processing.answers_minigpt4",
    "processing.pipeline_minigpt4",
    "processing.processing_llava",
    "processing.processing_minigpt4",
)
_complete: set[str] = set()


def _register(module: ModuleType) -> None:
    """Imports `auto`, which registers everything, once no module that it needs is still being imported."""
    _complete.add(module.__name__)
    if all(name in _complete for name in _AWAITED if name in sys.modules):
        importlib.import_module(f"{__name__}.auto")


_AWAITED = ("transformers", *(f"{__name__}.{name}" for name in _MODULES))
for _name in _AWAITED:
    register_post_import_hook(_register, _name)  # called at once for what is loaded already
