"""Puts captions and conversations into the forms of text that each training stage learns from."""

import random
import re
from typing import Any, Literal, NamedTuple, get_args

from .schema import IMAGE_PLACEHOLDER, DataError


Form = Literal["stage1", "stage2", "stage2_llama2", "messages"]
FORMS: tuple[str, ...] = get_args(Form)

# `prompts/alignment.txt` of Vision-CAIR/MiniGPT-4.
INSTRUCTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
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


def normalise_caption(caption: str) -> str:
    """
    A caption as stage 1 learns it.

    Lower case; each of `.!"()*#:;~` and every run of two or more whitespace characters become one space; newlines at
    the end and spaces at both ends go; what stands between spaces counts as a word, and the first 50 stay. A single
    tab or newline inside stays, as in BLIP.
    """
    text = re.sub(r"\s\s+", " ", caption.lower().translate(_BLANKED))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:MAX_CAPTION_WORDS])


def stage1_row(images: list[Any], caption: str) -> dict[str, Any]:
    """The row of stage 1: no words before the picture, then the normalised caption and a newline."""
    return {"images": images, "prompt": IMAGE_PLACEHOLDER, "completion": normalise_caption(caption) + "\n"}


def stage2_row(images: list[Any], caption: str, instruction: str, template: Template = VICUNA) -> dict[str, Any]:
    """The row of stage 2: picture and instruction in the template, then the caption as it is and the end mark."""
    prompt = template.prompt.format(f"<Img>{IMAGE_PLACEHOLDER}</Img> {instruction}")
    return {"images": images, "prompt": prompt, "completion": caption + template.end}


def messages_row(images: list[Any], caption: str, instruction: str) -> dict[str, Any]:
    """One question and its answer as messages, for a processor's own chat template."""
    return {
        "images": images,
        "messages": [
            {"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": instruction}]},
            {"role": "assistant", "content": [{"type": "text", "text": caption}]},
        ],
    }


def draw_instruction(*identity: int | str) -> str:
    """One of the four instructions, always the same for the same identity, such as seed, pass and key of a row."""
    return random.Random(repr(identity)).choice(INSTRUCTIONS)


def render(
    form: str, images: list[Any], caption: str | None, messages: list[dict[str, Any]] | None, instruction: str
) -> dict[str, Any]:
    """
    One row in the form asked for.

    Args:
        form: One of `FORMS`.
        images: The row's pictures, decoded or not.
        caption: The text of a caption, or of the only answer of a conversation; `None` for several turns.
        messages: The conversation, where the source has one.
        instruction: The instruction for forms that have one and captions that come without.

    Raises:
        DataError: for a form that the row cannot have.
    """
    if form == "messages" and messages is not None:
        return {"images": images, "messages": messages}
    if caption is None:
        raise DataError(f"several turns do not fit the form {form!r}; use form 'messages'")
    if len(images) != 1:
        raise DataError(f"a caption with {len(images)} pictures does not fit the form {form!r}")
    if form == "stage1":
        if not normalise_caption(caption):
            raise DataError(f"nothing is left of the caption {caption!r:.80} when it is normalised")
        return stage1_row(images, caption)
    if form == "stage2":
        return stage2_row(images, caption, instruction)
    if form == "stage2_llama2":
        return stage2_row(images, caption, instruction, LLAMA2)
    if form == "messages":
        return messages_row(images, caption, instruction)
    raise DataError(f"unknown form {form!r}; choose one of {', '.join(FORMS)}")
