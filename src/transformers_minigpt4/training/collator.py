"""Collates rows of images and texts into batches whose labels are the answers only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from PIL import Image
from transformers import LlavaProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from trl import get_training_chat_template, prepare_multimodal_messages
from trl.chat_template_utils import has_generation_markers

from transformers_minigpt4.data.schema import IMAGE_PLACEHOLDER, Message, Part, Row, RowImage, message_text, row_images
from transformers_minigpt4.processing.image_utils_minigpt4 import load_image
from transformers_minigpt4.processing.processing_llava import (
    LlavaPromptProcessor,
    encode_by_template,
    image_positions,
)
from transformers_minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from transformers_minigpt4.utils.families import family_of


IGNORED = -100
Batch: TypeAlias = dict[str, Any]  # tensors by the names of a model's arguments, and flags such as `use_cache`
Collator: TypeAlias = Callable[[list[Row]], Batch]
Tokens: TypeAlias = tuple[list[int], list[int]]  # ids and labels of a row


@dataclass
class ImageTextCollator:
    """
    Collates rows for vision-language models with a decoder, for `SFTTrainer` and `Trainer` alike.

    A row has `images` (a list, which may be empty) or `image`, and either `prompt` and `completion`, or `messages`.
    Prompt, image and padding positions have the label -100; answers are learned, with the stop strings that end them
    in the row. Prompt and answer are tokenized separately, as the authors do, with a single `<s>` in front.
    MiniGPT-4's conversations are split into their turns likewise; those of other models are tokenized in one piece,
    with assistant masks.

    Args:
        processor (`ProcessorMixin`): The model's processor.
        max_completion_length (`int`, *optional*):
            Tokens of an answer, including its stop string; longer ones are cut at the end. Nothing else is ever cut.
        chat_template (`str`, *optional*): For `messages`; by default the processor's own.
        max_row_length (`int`, *optional*):
            Positions of a row, images included; what exceeds them is cut at the end, as LLaVA's authors do. For LLaVA.

    Returns (per call): `input_ids`, `attention_mask`, `labels` of shape `(B, T)`, right-padded, and `pixel_values` of
    shape `(images, 3, height, width)` if the batch has any images.

    Raises:
        ValueError: for a row that leaves nothing to learn, or has no text.
    """

    processor: ProcessorMixin
    max_completion_length: int | None = None
    chat_template: str | None = None
    max_row_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_row_length is not None and not isinstance(self.processor, LlavaProcessor):
            raise ValueError(
                f"max_row_length={self.max_row_length} is for LLaVA, whose images are cut with their row. Leave it "
                "unset."
            )
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(f"max_completion_length={self.max_completion_length} leaves no answer. Take 1 or more.")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer

    def __call__(self, examples: list[Row]) -> Batch:
        rows = [self._normalize(example, index) for index, example in enumerate(examples)]
        conversations = [row for row in rows if "messages" in row]
        pairs = [row for row in rows if "messages" not in row]
        sequences: list[Tokens] = []
        pixels: list[torch.Tensor] = []
        for group, tokenize in ((conversations, self._tokenize_messages), (pairs, self._tokenize_pairs)):
            if group:
                found, images = tokenize(group)
                sequences += [self._cut(*sequence) for sequence in found]
                pixels += [] if images is None else [images]
        if self.max_row_length is not None:
            sequences, pixels = self._cut_rows(sequences, pixels)
            if all(label == IGNORED for _, labels in sequences for label in labels[1:]):
                raise ValueError(nothing_to_learn((conversations or pairs)[0]))
        else:
            for row, (_, labels) in zip([*conversations, *pairs], sequences):
                # Position 0 has no predecessor to predict it.
                if all(label == IGNORED for label in labels[1:]):
                    raise ValueError(nothing_to_learn(row))
        batch = self._pad(sequences)
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        return batch

    def _normalize(self, example: Row, index: int) -> Row:
        images = [_decoded(image) for image in row_images(example)]
        if example.get("messages"):
            return {"messages": _structured(example["messages"], len(images)), "images": images}
        prompt, completion = example.get("prompt"), example.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError(
                f"Row {index} of a batch has neither messages nor a prompt and a completion: {_shown(example)}."
            )
        if not completion:
            raise ValueError(nothing_to_learn(example))
        prompt = prompt.replace(IMAGE_PLACEHOLDER, self._image_token())
        return {"prompt": self._with_bos(prompt), "completion": completion, "images": images}

    def _image_token(self) -> str:
        return str(getattr(self.processor, "image_token", IMAGE_PLACEHOLDER))

    def _with_bos(self, prompt: str) -> str:
        """No special tokens are added below, so the prompt brings `<s>` if the tokenizer would put it in front."""
        bos = self.tokenizer.bos_token
        adds = bos is not None and self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return bos + prompt if adds and not prompt.startswith(bos) else prompt

    def _tokenize_pairs(self, rows: list[Row]) -> tuple[list[Tokens], torch.Tensor | None]:
        # With images, processors expand placeholders; they refuse an empty list of images.
        images = [row["images"] for row in rows] if any(row["images"] for row in rows) else None
        options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
        prompts = self.processor(images=images, text=[row["prompt"] for row in rows], **options)
        answers = self.processor(text=[row["completion"] for row in rows], **options)
        sequences = [
            (ids + answer, [IGNORED] * len(ids) + answer)
            for ids, answer in zip(_unpadded(prompts, "input_ids"), _unpadded(answers, "input_ids"))
        ]
        return sequences, prompts.get("pixel_values")

    def _tokenize_messages(self, rows: list[Row]) -> tuple[list[Tokens], torch.Tensor | None]:
        if hasattr(self.processor, "encode_conversation") or isinstance(self.processor, LlavaProcessor):
            turns = [self._tokenize_turns(row) for row in rows]
            return turns, self._pixels([row["images"] for row in rows if row["images"]])
        return self._tokenize_conversations(rows, marked_template(self.processor, self.chat_template))

    def _pixels(self, images: list[list[RowImage]]) -> torch.Tensor | None:
        if not images:
            return None
        text = [self._image_token() * len(shown) for shown in images]
        return self.processor(images=images, text=text, return_tensors="pt", padding=True)["pixel_values"]

    def _tokenize_conversations(self, rows: list[Row], template: str) -> tuple[list[Tokens], torch.Tensor | None]:
        batch: Batch = self.processor.apply_chat_template(  # type: ignore[assignment]  # annotated for text only
            [prepare_multimodal_messages(row["messages"], images=row["images"]) for row in rows],
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
        )
        batch["labels"] = batch["input_ids"].masked_fill(batch["assistant_masks"] == 0, IGNORED)
        return list(zip(_unpadded(batch, "input_ids"), _unpadded(batch, "labels"))), batch.get("pixel_values")

    def _tokenize_turns(self, row: Row) -> Tokens:
        processor = cast(MiniGPT4Processor, self.processor)  # or the same class as remote code
        if isinstance(self.processor, LlavaProcessor):
            ids, learned = self._encode_llava(self.processor, row["messages"])
            each = image_positions(self.processor)
        else:
            ids, learned = processor.encode_conversation(row["messages"], self.chat_template)
            each = processor.image_seq_length
        placeholders = ids.count(processor.image_token_id)
        if placeholders != len(row["images"]) * each:
            raise ValueError(
                f"A conversation has {placeholders // each} {processor.image_token} and {len(row['images'])} images: "
                f"{_shown(row)}. Give as many images as image parts."
            )
        return ids, [id_ if learns else IGNORED for id_, learns in zip(ids, learned)]

    def _encode_llava(self, processor: LlavaProcessor, messages: list[Message]) -> tuple[list[int], list[bool]]:
        if isinstance(processor, LlavaPromptProcessor):
            return processor.encode_conversation(messages, self.chat_template, self.max_row_length)
        template = self.chat_template or processor.chat_template
        if not isinstance(template, str):
            raise ValueError("The processor has no chat template. Set processor.chat_template.")
        return encode_by_template(processor, messages, template)

    def _cut_rows(
        self, sequences: list[Tokens], pixels: list[torch.Tensor]
    ) -> tuple[list[Tokens], list[torch.Tensor]]:
        """Rows of at most `max_row_length` positions, and the images that are left; one that is cut is left out."""
        processor = cast(LlavaProcessor, self.processor)
        each, start = image_positions(processor), 0
        cut: list[Tokens] = []
        kept: list[int] = []
        for ids, labels in sequences:
            end = min(len(ids), cast(int, self.max_row_length))
            images, left = divmod(ids[:end].count(processor.image_token_id), each)
            end -= left  # nothing of an image that is cut can matter: nothing after it is left
            kept += range(start, start + images)
            start += ids.count(processor.image_token_id) // each
            cut.append((ids[:end], labels[:end]))
        return cut, [torch.cat(pixels)[kept]] if kept else []

    def _cut(self, ids: list[int], labels: list[int]) -> Tokens:
        """Drops what exceeds `max_completion_length` from every run of learned tokens."""
        if self.max_completion_length is None:
            return ids, labels
        run, kept = 0, []
        for index, label in enumerate(labels):
            run = 0 if label == IGNORED else run + 1
            if run <= self.max_completion_length:
                kept.append(index)
        return [ids[i] for i in kept], [labels[i] for i in kept]

    def _pad(self, sequences: list[Tokens]) -> Batch:
        shape = len(sequences), max(len(ids) for ids, _ in sequences)
        batch = {
            "input_ids": torch.full(shape, self.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for row, (ids, labels) in enumerate(sequences):
            batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, : len(ids)] = torch.tensor(labels)
        return batch


@dataclass
class EncoderDecoderCollator(ImageTextCollator):
    """
    Collates rows for BLIP-2 with an encoder–decoder language model: image and prompt are encoded, the answer decoded.

    Its processor puts the image tokens in front of the prompt itself, so placeholders, and the `<Img>` tags around
    them, are removed from it. One question and its answer may be given as messages too. The decoder's own end token
    ends every answer that fits.
    """

    def __call__(self, examples: list[Row]) -> Batch:
        rows = [self._normalize(example, index) for index, example in enumerate(examples)]
        for row in rows:
            if "prompt" not in row or len(row["images"]) != 1:
                raise ValueError(
                    f"BLIP-2 takes rows of one image, a prompt and a completion, not {_shown(row)}. Choose such a "
                    "source."
                )
        inputs = self.processor(
            images=[row["images"][0] for row in rows],
            text=[row["prompt"] for row in rows],
            padding=True,
            return_tensors="pt",
        )
        answers = self.tokenizer(
            [row["completion"].strip() for row in rows],
            truncation=self.max_completion_length is not None,
            max_length=self.max_completion_length,
        )["input_ids"]
        for row, ids in zip(rows, answers):
            if all(token in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id) for token in ids):
                raise ValueError(nothing_to_learn(row))
        labels = torch.full((len(rows), max(map(len, answers))), IGNORED)
        for place, ids in enumerate(answers):
            labels[place, : len(ids)] = torch.tensor(ids)
        return {**inputs, "labels": labels}

    def _normalize(self, example: Row, index: int) -> Row:
        row = super()._normalize(example, index)
        if "messages" in row:
            turns = [(turn["role"], message_text(turn)) for turn in row["messages"]]
            if [role for role, _ in turns] == ["user", "assistant"]:
                return {"images": row["images"], "prompt": turns[0][1], "completion": turns[1][1]}
        else:
            prompt = example["prompt"].replace(f"<Img>{IMAGE_PLACEHOLDER}</Img>", "").replace(IMAGE_PLACEHOLDER, "")
            row["prompt"] = prompt.strip()
        return row


def make_collator(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    max_completion_length: int | None = None,
    chat_template: str | None = None,
    max_row_length: int | None = None,
) -> ImageTextCollator:
    """
    The collator that a model's loss needs.

    Raises:
        ValueError: for BLIP-2 with a decoder-only language model, whose processor cannot separate prompt and answer.
    """
    return collator_of(model.config, processor, max_completion_length, chat_template, max_row_length)


def collator_of(
    config: PreTrainedConfig,
    processor: ProcessorMixin,
    max_completion_length: int | None = None,
    chat_template: str | None = None,
    max_row_length: int | None = None,
) -> ImageTextCollator:
    """As [`make_collator`], from a model's config alone."""
    if not family_of(config).encoder_decoder:
        return ImageTextCollator(processor, max_completion_length, chat_template, max_row_length)
    if getattr(config, "use_decoder_only_language_model", False):
        raise ValueError(
            "BLIP-2 with a decoder-only language model (OPT) is not supported here. Take one with FlanT5, or compose "
            "a MiniGPT-4 with that language model."
        )
    return EncoderDecoderCollator(processor, max_completion_length)


def marked_template(processor: ProcessorMixin, chat_template: str | None = None) -> str:
    """
    A chat template that marks its answers, for a processor that cannot find them itself: its own, or TRL's variant.

    Raises:
        ValueError: for a template without `{% generation %}` marks that TRL does not know.
    """
    template = chat_template or getattr(processor, "chat_template", None)
    if isinstance(template, str) and not has_generation_markers(template):
        template = get_training_chat_template(processor)
    if not isinstance(template, str):
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so conversations cannot be told from answers. Set "
            "processor.chat_template to one with {% generation %} tags, or give prompts and completions."
        )
    return template


def nothing_to_learn(row: Row) -> str:
    """The message for a row whose answer is empty."""
    return (
        f"Nothing of a row is left to learn, because its answer is empty: {_shown(row)}. Give every row an answer, or "
        "drop it from the source."
    )


def _decoded(image: RowImage) -> Image.Image:
    """An image that a source left undecoded as a PIL image; others as they are."""
    if isinstance(image, dict):
        return load_image(image["path"] if image.get("bytes") is None else image["bytes"])
    return image


def _unpadded(batch: Mapping[str, torch.Tensor], name: str) -> list[list[int]]:
    """Values of the positions that the attention mask keeps, row by row."""
    return [values[mask].tolist() for values, mask in zip(batch[name], batch["attention_mask"].bool())]


def _structured(messages: list[Message], images: int) -> list[Message]:
    """Contents as lists of parts; if no message has image parts, they are put before the first question."""
    turns: list[Message] = []
    for message in messages:
        content = message["content"]
        parts: list[Part] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        # Arrow fills the keys of one part into all others.
        parts = [cast(Part, {key: value for key, value in part.items() if value is not None}) for part in parts]
        turns.append({"role": message["role"], "content": parts})
    if not any(part["type"] == "image" for turn in turns for part in turn["content"]):
        question = next((turn for turn in turns if turn["role"] == "user"), None)
        if question is not None:
            question["content"] = [Part(type="image") for _ in range(images)] + question["content"]
    return turns


def _shown(row: Row) -> str:
    """A row without its images, short enough for an error."""
    text = str({key: value for key, value in row.items() if key not in ("image", "images")})
    return text if len(text) <= 200 else text[:200] + "…"
