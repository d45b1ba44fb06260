"""Compares the prompts that a recipe trains with those that a checkpoint's chat template asks."""

import copy
from typing import Any

from transformers import LlavaProcessor, PreTrainedConfig, ProcessorMixin

from transformers_minigpt4.data.prompt_formats import INSTRUCTIONS, LLAMA2, VICUNA, PromptFormat, Template
from transformers_minigpt4.data.schema import IMAGE_PLACEHOLDER
from transformers_minigpt4.processing.answers_minigpt4 import NoEndMarkError, find_answers
from transformers_minigpt4.processing.chat_templates_minigpt4 import with_end_marks
from transformers_minigpt4.processing.processing_llava import LlavaPromptProcessor, check_template
from transformers_minigpt4.processing.prompt_formats_llava import PROMPT_FORMATS as LLAVA_FORMATS
from transformers_minigpt4.utils.families import BLIP2, LLAVA, family_of
from transformers_minigpt4.utils.text import first_line

from .collator import marked_template


# Prompt formats with a template of their own, and the recipe that has each.
_TEMPLATES: dict[PromptFormat, tuple[Template, str]] = {
    "stage2": (VICUNA, "minigpt4_stage2"),
    "stage2_llama2": (LLAMA2, "minigpt4_llama2_stage2"),
}
_RECIPES = {LLAVA.name: "llava_stage2", BLIP2.name: "blip2_ft"}  # for `messages`, by family
_QUESTION, _ANSWER = INSTRUCTIONS[0], "A red circle."
_TURN: Any = (
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]},
    {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]},
)


def fit_processor(prompt_format: PromptFormat, config: PreTrainedConfig, processor: ProcessorMixin) -> ProcessorMixin:
    """
    The processor that trains a prompt format, and that a trained checkpoint is saved with.

    A prompt format of LLaVA's authors replaces the chat template of a LLaVA. A template that prints nothing after an
    answer gets the end mark that is learned, so that later turns of a chat look as they were trained.

    Args:
        prompt_format (`str`): The recipe's.
        config (`PreTrainedConfig`): The checkpoint's.
        processor (`ProcessorMixin`): The checkpoint's, which is not changed.
    """
    if not isinstance(processor, LlavaProcessor):
        return processor
    if prompt_format in LLAVA_FORMATS:
        if isinstance(processor, LlavaPromptProcessor) and processor.writes(prompt_format):
            return processor
        return LlavaPromptProcessor.of(processor, prompt_format, config.vision_config.patch_size)
    template = getattr(processor, "chat_template", None)
    if prompt_format == "messages" and isinstance(template, str):
        try:
            find_answers(template, _TURN, processor.tokenizer)
        except NoEndMarkError:
            processor = copy.copy(processor)
            processor.chat_template = with_end_marks(template)
        except ValueError:
            pass  # `check_prompt_format` says what is wrong
    return processor


def check_prompt_format(
    prompt_format: PromptFormat, config: PreTrainedConfig, processor: ProcessorMixin, name: str
) -> None:
    """
    Refuses a prompt format whose prompts would never be asked again, and a chat template that cannot be trained.

    `stage1` has no prompt and fits every model.

    Args:
        prompt_format (`str`): The recipe's.
        config (`PreTrainedConfig`): The checkpoint's.
        processor (`ProcessorMixin`): The checkpoint's.
        name (`str`): The checkpoint, for messages.

    Raises:
        ValueError: naming the recipe, or the prompt format, to take instead.
    """
    if prompt_format.startswith("llava_") and family_of(config) is not LLAVA:
        raise ValueError(
            f"prompt_format: {prompt_format} is for LLaVA, and {name} is another model. Take prompt_format: messages."
        )
    if prompt_format == "messages" and isinstance(processor, LlavaPromptProcessor) and processor.has_own_template:
        raise ValueError(
            f"{name} has the prompt format {processor.prompt_format}. Set prompt_format: {processor.prompt_format}, "
            "which skips and counts the conversations that it cannot express."
        )
    if prompt_format == "messages" and not family_of(config).encoder_decoder:
        try:
            if hasattr(processor, "check_trainable"):
                processor.check_trainable()
            elif isinstance(processor, LlavaProcessor):
                check_template(processor, str(processor.chat_template))
            else:
                marked_template(processor)
        except ValueError as error:
            raise ValueError(f"prompt_format: messages cannot be trained on {name}. {error}") from error
    if prompt_format not in _TEMPLATES:
        return
    asked, answered = _chat(processor)
    fitting = [key for key, (template, _) in _TEMPLATES.items() if _fits(template, asked, answered)]
    if prompt_format in fitting:
        return
    trained = _TEMPLATES[prompt_format][0].prompt.format(f"<Img>{IMAGE_PLACEHOLDER}</Img> {_QUESTION}")
    raise ValueError(
        f"prompt_format: {prompt_format} trains {trained!r}, but the chat template of {name} asks {asked[-120:]!r}: "
        f"the trained prompt would never be asked again. {_advice(config, fitting)}"
    )


def _advice(config: PreTrainedConfig, fitting: list[PromptFormat]) -> str:
    if fitting:
        return f"Take the recipe {_TEMPLATES[fitting[0]][1]}, or set prompt_format: {fitting[0]}."
    recipe = _RECIPES.get(family_of(config).name)
    if recipe is not None:
        return f"Take the recipe {recipe}, or set prompt_format: messages."
    return "Take this recipe with --prompt-format messages, as the header of the recipe modern says."


def _chat(processor: ProcessorMixin) -> tuple[str, str]:
    """What a processor asks about an image, and the same with an answer."""
    question: Any = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}
    answer: Any = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
    if not getattr(processor, "chat_template", None):
        return _QUESTION, _QUESTION
    try:
        return (
            str(processor.apply_chat_template([question], add_generation_prompt=True)),
            str(processor.apply_chat_template([question, answer])),
        )
    except Exception as error:  # a template is code from elsewhere and may raise anything
        return f"({first_line(error)})", ""


def _fits(template: Template, asked: str, answered: str) -> bool:
    """Whether a chat asks with a template, apart from what precedes it; the authors' chat has no space before ###."""
    prompt = template.prompt.format(f"<Img>{IMAGE_PLACEHOLDER}</Img> {_QUESTION}")
    return asked.endswith(prompt.replace(" ###", "###").removeprefix("###")) and answered.endswith(
        _ANSWER + template.end
    )
