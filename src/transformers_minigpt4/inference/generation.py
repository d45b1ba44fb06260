"""Answers prompts about images in one batch, with any image-text-to-text model."""

import copy
import threading
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from transformers_minigpt4.processing.pipeline_minigpt4 import DEFAULT_PROMPT
from transformers_minigpt4.utils.files import JsonObject
from transformers_minigpt4.utils.models import GenerativeModel


# The answer length of the authors' chat, for checkpoints whose generation config sets none.
DEFAULT_MAX_NEW_TOKENS = 300
# A fast tokenizer keeps its padding settings in Rust, where shallow copies share them: two threads that pad on
# different sides, or one tokenizer with and without padding, as BLIP-2 does, would overwrite each other's.
_TOKENIZER_LOCK = threading.Lock()


def caption_images(
    images: Sequence[Image.Image],
    model: GenerativeModel,
    processor: ProcessorMixin,
    prompt: str = DEFAULT_PROMPT,
    **generate_kwargs: object,
) -> list[str]:
    """
    Answer one prompt about each image, all in one batch.

    Args:
        images (`Sequence[PIL.Image.Image]`): RGB images of any sizes.
        model (`PreTrainedModel`), processor (`ProcessorMixin`): of any image-text-to-text family.
        prompt (`str`, *optional*): one user turn; a processor without chat template gets the bare text.
        generate_kwargs: passed on to `model.generate`.

    Returns:
        `list[str]`: one answer per image, without prompt, special tokens and surrounding white space.

    Raises:
        ValueError: if `generate_kwargs` ask for several answers per image.
    """
    return answer_prompts([[image] for image in images], [prompt] * len(images), model, processor, **generate_kwargs)


def answer_prompts(
    images: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    model: GenerativeModel,
    processor: ProcessorMixin,
    earlier: Sequence[Sequence[tuple[str, str]]] | None = None,
    /,
    **generate_kwargs: object,
) -> list[str]:
    """
    Answer prompts of one user turn each, all in one batch. Several threads may share `processor`.

    Args:
        images (`Sequence[Sequence[PIL.Image.Image]]`): the images of each prompt, the same number for all; they come
            before its text. None at all for prompts that are text only.
        prompts (`Sequence[str]`): without image placeholder; a processor without chat template gets the bare text.
        model (`PreTrainedModel`), processor (`ProcessorMixin`): of any image-text-to-text family.
        earlier (`Sequence[Sequence[tuple[str, str]]]`, *optional*): prompts and answers of the turns before each
            prompt. The first of them has the images.
        generate_kwargs: passed on to `model.generate`.

    Returns:
        `list[str]`: one answer per prompt, without prompt, special tokens and surrounding white space.

    Raises:
        ValueError: if the model cannot take that many images or turns per prompt, or `generate_kwargs` ask for several
            answers or for more than the answers.
    """
    earlier = earlier if earlier is not None else [()] * len(prompts)
    inputs = _inputs(images, prompts, earlier, processor).to(model.device, dtype=model.dtype)
    if getattr(model.generation_config, "max_new_tokens", None) is None:
        generate_kwargs = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **generate_kwargs}
    sequences = generate_ids(model, inputs, **generate_kwargs)
    if len(sequences) != len(prompts):
        raise ValueError(
            f"the generation settings gave {len(sequences)} answers for {len(prompts)} prompts, but a record holds "
            "one; leave num_return_sequences at 1"
        )
    return decode_answers(processor, sequences)


def generate_ids(
    model: GenerativeModel, inputs: Mapping[str, torch.Tensor], **generate_kwargs: object
) -> torch.Tensor:
    """
    Generates, and returns the new ids only.

    Args:
        model (`PreTrainedModel`): generates.
        inputs (`Mapping[str, torch.Tensor]`): what its processor returned, on its device.
        generate_kwargs: passed on to `model.generate`.

    Returns:
        `torch.Tensor`: of shape `(B, new tokens)`, without the prompt.

    Raises:
        ValueError: if `generate_kwargs` ask for more than the ids.
    """
    sequences = model.generate(**inputs, **generate_kwargs)
    if not isinstance(sequences, torch.Tensor):
        raise ValueError("the generation settings ask for more than the answers; leave out return_dict_in_generate")
    prompt = inputs.get("input_ids")
    # Decoder-only models repeat the prompt before the answer, encoder-decoder models do not.
    if prompt is not None and torch.equal(sequences[:, : prompt.shape[1]], prompt.to(sequences.device)):
        sequences = sequences[:, prompt.shape[1] :]
    return sequences


def decode_answers(processor: ProcessorMixin, sequences: torch.Tensor) -> list[str]:
    """
    The text of generated ids, without special tokens, stop strings and surrounding white space.

    Args:
        processor (`ProcessorMixin`): decodes.
        sequences (`torch.Tensor` of shape `(B, new tokens)`): the new ids only.
    """
    return [text.strip() for text in processor.post_process_image_text_to_text(sequences)]


def context_length(model: GenerativeModel) -> int | None:
    """Positions that the language model was trained with, unless its positions are stretched."""
    text_config = model.config.get_text_config(decoder=True)
    rope_type = (getattr(text_config, "rope_parameters", None) or {}).get("rope_type", "default")
    context = getattr(text_config, "max_position_embeddings", None)
    return context if rope_type == "default" and isinstance(context, int) else None


def _inputs(
    images: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    earlier: Sequence[Sequence[tuple[str, str]]],
    processor: ProcessorMixin,
) -> BatchFeature:
    if getattr(processor, "chat_template", None):
        rows = [conversation(*row) for row in zip(images, prompts, earlier, strict=True)]
        return encode_conversations(rows, processor)
    if any(earlier):
        raise ValueError(
            f"{type(processor).__name__} has no chat template and takes one turn only; use a checkpoint with a chat "
            "template"
        )
    for row in images:
        if len(row) != 1:
            raise ValueError(
                f"{type(processor).__name__} has no chat template and takes one image per prompt, but a prompt has "
                f"{len(row)}; use a checkpoint with a chat template"
            )
    flat = [image for row in images for image in row]
    with _TOKENIZER_LOCK:
        return _padding_left(processor)(images=flat, text=list(prompts), padding=True, return_tensors="pt")


def encode_conversations(conversations: Sequence[list[JsonObject]], processor: ProcessorMixin) -> BatchFeature:
    """
    Model inputs of a batch of conversations, padded on the left. Several threads may share `processor`.

    Args:
        conversations (`Sequence[list[dict]]`): as chat templates take them, with PIL images.
        processor (`ProcessorMixin`): one with a chat template.
    """
    with _TOKENIZER_LOCK:
        return _padding_left(processor).apply_chat_template(  # type: ignore[return-value]  # annotated for one case only
            list(conversations),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )


def _padding_left(processor: ProcessorMixin) -> ProcessorMixin:
    """A shallow copy of a processor, whose tokenizer pads on the left, so that all answers start in one column."""
    processor = copy.copy(processor)
    processor.tokenizer = tokenizer = copy.copy(processor.tokenizer)
    tokenizer.padding_side = "left"
    # Processors pass a side on to all their tokenizers if this one was loaded with it. InstructBLIP's second one must
    # keep its own: its network counts positions from the left.
    tokenizer.init_kwargs = {name: value for name, value in tokenizer.init_kwargs.items() if name != "padding_side"}
    return processor


def conversation(
    images: Sequence[Image.Image], prompt: str, earlier: Sequence[tuple[str, str]] = ()
) -> list[JsonObject]:
    """A user turn after earlier ones, the images first, as chat templates take them."""
    content: list[JsonObject] = [{"type": "image", "image": image} for image in images]
    turns: list[JsonObject] = []
    for question, answer in earlier:
        turns.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer or " "}]})
        content = []
    return [*turns, {"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
