"""
Registers MiniGPT-4, and LLaVA with a linear projector, with transformers on import: Auto classes and pipelines.

The package imports this module as soon as transformers is loaded.
"""

import logging

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling.configuration_llava import LlavaLinearConfig
from .modeling.configuration_minigpt4 import MiniGPT4Config
from .modeling.modeling_llava import LlavaLinearForConditionalGeneration, LlavaLinearModel
from .modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model
from .modeling.modeling_minigpt4 import MiniGPT4PreTrainedModel as MiniGPT4PreTrainedModel  # for the package's names
from .processing.pipeline_minigpt4 import MiniGPT4ImageToTextPipeline
from .processing.processing_llava import LlavaPromptProcessor
from .processing.processing_minigpt4 import MiniGPT4Processor


class _TaskNameWarning(logging.Filter):
    """
    Keeps back what transformers 5.23 logs about the task name "image-to-text" until the model is known.

    It says that the task was removed, which does not hold for MiniGPT-4. For other models it is logged after all, as
    one line: it comes with a warning category that its format does not use, so logging would print a traceback.
    """

    held: logging.LogRecord | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.args != (UserWarning,):
            return True
        record.args = ()
        self.held = record
        return False

    def release(self) -> None:
        """Logs the line that was kept back, for a model of another family."""
        if self.held is not None:
            held, self.held = self.held, None
            logging.getLogger(held.name).handle(held)


_TASK_NAME_WARNING = _TaskNameWarning()


def register() -> None:
    """Registers the models in this process, and their code to be saved with checkpoints. May be called repeatedly."""
    AutoConfig.register("minigpt4", MiniGPT4Config, exist_ok=True)
    AutoModel.register(MiniGPT4Config, MiniGPT4Model, exist_ok=True)
    AutoConfig.register("llava_linear", LlavaLinearConfig, exist_ok=True)
    AutoModel.register(LlavaLinearConfig, LlavaLinearModel, exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(MiniGPT4Config, MiniGPT4ForConditionalGeneration, exist_ok=True)
        auto_class.register(LlavaLinearConfig, LlavaLinearForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(MiniGPT4Config, MiniGPT4Processor, exist_ok=True)
    AutoProcessor.register(LlavaLinearConfig, LlavaPromptProcessor, exist_ok=True)

    # A saved folder then contains the modules, and its config an `auto_map`.
    MiniGPT4Config.register_for_auto_class()
    MiniGPT4Model.register_for_auto_class("AutoModel")
    MiniGPT4ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    MiniGPT4Processor.register_for_auto_class()
    LlavaPromptProcessor.register_for_auto_class()
    LlavaLinearConfig.register_for_auto_class()
    LlavaLinearModel.register_for_auto_class("AutoModel")
    LlavaLinearForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

    # transformers reads "image-to-text" as this task (5.16 to 5.18 only with an alias), whose pipeline refuses a call
    # without text. Ours takes one, and gives every other model the stock pipeline.
    PIPELINE_REGISTRY.task_aliases.setdefault("image-to-text", "image-text-to-text")
    PIPELINE_REGISTRY.supported_tasks["image-text-to-text"]["impl"] = MiniGPT4ImageToTextPipeline
    logging.getLogger("transformers.pipelines").addFilter(_TASK_NAME_WARNING)
    MiniGPT4ImageToTextPipeline.before_stock = _TASK_NAME_WARNING.release


register()
