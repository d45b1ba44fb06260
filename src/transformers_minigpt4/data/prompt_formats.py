"""Puts captions and conversations into the prompt format that a training stage learns from."""

import random
import re
from typing import Literal, NamedTuple, get_args

from transformers_minigpt4.processing import prompt_formats_llava

from .schema import IMAGE_PLACEHOLDER, DataError, Message, Row, RowImage


PromptFormat = Literal[
    "stage1",
    "stage2",
    "stage2_llama2",
    "messages",
    "llava_plain",
    "llava_v0",
    "llava_v1",
    "llava_v0_mmtag",
    "llava_v1_mmtag",
    "llava_llama_2",
]
PROMPT_FORMATS: tuple[str, ...] = get_args(PromptFormat)

# `prompts/alignment.txt` of Vision-CAIR/MiniGPT-4.
INSTRUCTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)

# Table 11 of LLaVA's article (arXiv 2304.08485), the questions of its stage 1; apostrophe as in the released data.
LLAVA_INSTRUCTIONS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)


class Template(NamedTuple):
    """How stage 2 frames an instruction, and what ends the answer."""

    prompt: str
    end: str


# `prompt_template` and `end_sym` of the authors' stage-2 configurations.
VICUNA = Template("###Human: {} ###Assistant: ", "###")
LLAMA2 = Template("[INST] {} [/INST] ", "</s>")

# BLIP's caption processor, which the authors apply in stage 1 and not in stage 2.
MAX_CAPTION_WORDS = 50
_BLANKED = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))


def normalize_caption(caption: str) -> str:
    """
    A caption as stage 1 learns it.

    Lower case; each of `.!"()*#:;~` and every run of two or more whitespace characters become one space; newlines at
    the end and spaces at both ends are removed; the first 50 words, separated by spaces, are kept. A single tab or
    newline inside the caption is kept, as in BLIP.
    """
    text = re.sub(r"\s\s+", " ", caption.lower().translate(_BLANKED))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:MAX_CAPTION_WORDS])


def stage1_row(images: list[RowImage], caption: str) -> Row:
    """The row of stage 1: no words before the image, then the normalized caption and a newline."""
    return {"images": images, "prompt": IMAGE_PLACEHOLDER, "completion": normalize_caption(caption) + "\n"}


def stage2_row(images: list[RowImage], caption: str, instruction: str, template: Template = VICUNA) -> Row:
    """The row of stage 2: image and instruction in the template, then the caption as it is and the stop string."""
    prompt = template.prompt.format(f"<Img>{IMAGE_PLACEHOLDER}</Img> {instruction}")
    return {"images": images, "prompt": prompt, "completion": caption + template.end}


def messages_row(images: list[RowImage], caption: str, instruction: str) -> Row:
    """One question and its answer as messages, for a processor's own chat template."""
    return {
        "images": images,
        "messages": [
            {"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": instruction}]},
            {"role": "assistant", "content": [{"type": "text", "text": caption}]},
        ],
    }


def plain_row(images: list[RowImage], caption: str) -> Row:
    """The row of LLaVA's later stage 1: no question, then the caption as it is and a newline."""
    return {"images": images, "prompt": IMAGE_PLACEHOLDER, "completion": caption + "\n"}


def check_llava(prompt_format: str, messages: list[Message]) -> None:
    """
    Refuses a conversation that LLaVA's authors would not learn from.

    Raises:
        DataError: for one that their script masks, or fails on.
    """
    tagged = prompt_formats_llava.PROMPT_FORMATS[prompt_format].tagged
    turns = [prompt_formats_llava.turn_of(message, tagged) for message in messages]
    try:
        fault = prompt_formats_llava.write(prompt_format, turns).fault
    except ValueError as error:
        raise DataError(str(error)) from error
    if fault is not None:
        raise DataError(fault)


def draw_instruction(prompt_format: str, *identity: int | str) -> str:
    """
    One of the instructions for captions: MiniGPT-4's four, or LLaVA's eleven in LLaVA's prompt formats.

    It is always the same for the same identity, such as seed, epoch and key of a row.
    """
    is_llava = prompt_format in prompt_formats_llava.PROMPT_FORMATS
    return random.Random(repr(identity)).choice(LLAVA_INSTRUCTIONS if is_llava else INSTRUCTIONS)


def render(
    prompt_format: str,
    images: list[RowImage],
    caption: str | None,
    messages: list[Message] | None,
    instruction: str,
) -> Row:
    """
    One row in the requested prompt format.

    Args:
        prompt_format: One of `PROMPT_FORMATS`.
        images: The row's images, decoded or not.
        caption: The text of a caption, or of the only answer of a conversation; `None` for several turns.
        messages: The conversation, where the source has one.
        instruction: The instruction for prompt formats that have one and captions that come without.

    Raises:
        DataError: for a prompt format that the row cannot have.
    """
    is_llava = prompt_format in prompt_formats_llava.PROMPT_FORMATS
    if is_llava and messages is not None:
        check_llava(prompt_format, messages)
    if (is_llava or prompt_format == "messages") and messages is not None:
        return {"images": images, "messages": messages}
    if caption is None:
        raise DataError(f"several turns do not fit the prompt format {prompt_format!r}; use 'messages'")
    if len(images) != 1:
        raise DataError(f"a caption with {len(images)} images does not fit the prompt format {prompt_format!r}")
    if prompt_format == "stage1":
        if not normalize_caption(caption):
            raise DataError(f"nothing is left of the caption {caption!r:.80} when it is normalized")
        return stage1_row(images, caption)
    if prompt_format == "stage2":
        return stage2_row(images, caption, instruction)
    if prompt_format == "stage2_llama2":
        return stage2_row(images, caption, instruction, LLAMA2)
    if prompt_format == "llava_plain":
        return plain_row(images, caption)
    if prompt_format == "messages" or is_llava:
        return messages_row(images, caption, instruction)
    raise DataError(f"unknown prompt format {prompt_format!r}; choose one of {', '.join(PROMPT_FORMATS)}")
