"""Rows of pictures and texts to batches whose labels stand on the answers alone."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from transformers_minigpt4.processing.image_utils_minigpt4 import load_image


IGNORED = -100
IMAGE_PLACEHOLDER = "<ImageHere>"  # in the prompts of rows, whatever the model calls its own
# The authors train conversations in the single-turn frame of stage 2, turn after turn, with `<s>` before each question
# and without system text (`conv_train` of the golden files), which differs from the chat that their demo holds.
TRAINING_TEMPLATE_VICUNA_V0 = (
    "{%- for message in messages -%}{%- if message.role == 'user' -%}{{- bos_token + '###Human: ' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if not loop.first -%}{{- ' ' -}}{%- endif -%}"
    "{{- '<Img><ImageHere></Img>' if part.type == 'image' else part.text -}}{%- endfor -%}{%- endif -%}"
    "{{- ' ###Assistant: ' -}}{%- elif message.role == 'assistant' -%}{%- generation -%}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{{- part.text -}}{%- endfor -%}{%- endif -%}{{- '###' -}}{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
)


@dataclass
class ImageTextCollator(DataCollatorForVisionLanguageModeling):
    """
    TRL's vision collator with this model's rules, for `SFTTrainer` and `Trainer` alike.

    A row has `images` (a list, which may be empty) or `image`, and either `prompt` and `completion`, or `messages`.
    Prompt, image and padding positions carry -100; answers and their end marks, which the row brings, are learnt.
    Prompt and answer are tokenised apart, as the authors do, and `<s>` stands once in front. MiniGPT-4's conversations
    are cut into their turns likewise; those of other models are tokenised whole, with assistant masks.

    Args:
        processor (`ProcessorMixin`): The model's processor.
        max_completion_length (`int`, *optional*):
            Tokens of an answer, its end mark among them; what is longer loses its tail. Nothing else is ever cut.
        chat_template (`str`, *optional*): For `messages`; by default the processor's own.

    Returns (per call): `input_ids`, `attention_mask`, `labels` of shape `(B, T)`, right-padded, and `pixel_values` of
    shape `(images, 3, height, width)` where the batch has any.

    Raises:
        ValueError: for a row that leaves nothing to learn, or has no text.
    """

    max_completion_length: int | None = None

    def __post_init__(self):
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(f"max_completion_length={self.max_completion_length} leaves no answer. Take 1 or more.")

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [self._normalise(example, index) for index, example in enumerate(examples)]
        groups = [row for row in rows if "messages" in row], [row for row in rows if "messages" not in row]
        sequences: list[tuple[list[int], list[int]]] = []
        pixels: list[torch.Tensor] = []
        sources: list[dict[str, Any]] = []
        for group, collate in zip(groups, (self._collate_messages, self._collate_pairs)):
            if group:
                found, pictures = collate([dict(row) for row in group])
                sequences += found
                sources += group
                pixels += [] if pictures is None else [pictures]
        sequences = [self._cut(*sequence) for sequence in sequences]
        for row, (_, labels) in zip(sources, sequences):
            # Position 0 has no predecessor to predict it.
            if all(label == IGNORED for label in labels[1:]):
                raise ValueError(
                    f"Nothing of a row is left to learn, because its answer is empty: {_shown(row)}. Give every row "
                    "an answer, or drop it from the source."
                )
        batch = self._pad(sequences)
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        return batch

    def _normalise(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        images = [example["image"]] if example.get("image") is not None else list(example.get("images") or [])
        images = [_decoded(image) for image in images]
        if example.get("messages"):
            return {"messages": _structured(example["messages"], len(images)), "images": images}
        prompt, completion = example.get("prompt"), example.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError(
                f"Row {index} of a batch has neither messages nor a prompt and a completion: {_shown(example)}."
            )
        prompt = prompt.replace(IMAGE_PLACEHOLDER, self._image_token())
        if not completion:
            raise ValueError(
                f"Nothing of a row is left to learn, because its answer is empty: {_shown(example)}. Give every row "
                "an answer, or drop it from the source."
            )
        return {"prompt": self._with_bos(prompt), "completion": completion, "images": images}

    def _image_token(self) -> str:
        return str(getattr(self.processor, "image_token", IMAGE_PLACEHOLDER))

    def _with_bos(self, prompt: str) -> str:
        """TRL adds no special tokens, so the prompt brings `<s>` where the tokenizer would put it in front."""
        tokenizer = self.processor.tokenizer
        bos = tokenizer.bos_token
        adds = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return bos + prompt if adds and not prompt.startswith(bos) else prompt

    def _collate_pairs(self, rows: list[dict[str, Any]]):
        self.completion_only_loss = True
        return _unpadded(self._collate_prompt_completion(rows))

    def _collate_messages(self, rows: list[dict[str, Any]]):
        template: str | None = self.chat_template or self.processor.chat_template  # type: ignore[has-type]
        if template is not None and not has_generation_markers(template):
            template = get_training_chat_template(self.processor)
        if template is None:
            raise ValueError(
                f"{type(self.processor).__name__} has no chat template, so conversations cannot be told from answers. "
                "Set processor.chat_template to one with {% generation %} marks, or give prompts and completions."
            )
        if not hasattr(self.processor, "image_seq_length"):  # not MiniGPT-4's: one tokenisation of the whole
            self.assistant_only_loss, self.completion_only_loss, self.chat_template = True, False, template
            return _unpadded(self._collate_language_modeling(rows))
        return [self._turns(row, template) for row in rows], self._pixels(rows)

    def _turns(self, row: dict[str, Any], template: str) -> tuple[list[int], list[int]]:
        tokenizer, token = self.processor.tokenizer, self._image_token()
        (text,), (spans,) = render_jinja_template(
            [row["messages"]],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        placeholders = text.count(token)
        if placeholders != len(row["images"]):
            raise ValueError(
                f"A conversation has {placeholders} {token} and {len(row['images'])} images: {_shown(row)}. Give as "
                "many images as image parts."
            )
        ids: list[int] = []
        labels: list[int] = []
        end = 0
        for start, stop in [*spans, (len(text), len(text))]:
            for segment, learns in ((text[end:start], False), (text[start:stop], True)):
                expanded = segment.replace(token, token * self.processor.image_seq_length)
                found = tokenizer(expanded, add_special_tokens=False)["input_ids"] if segment else []
                ids += found
                labels += found if learns else [IGNORED] * len(found)
            end = stop
        return ids, labels

    def _pixels(self, rows: list[dict[str, Any]]) -> torch.Tensor | None:
        images = [row["images"] for row in rows if row["images"]]
        if not images:
            return None
        text = [self._image_token() * len(pictures) for pictures in images]
        return self.processor(images=images, text=text, return_tensors="pt", padding=True)["pixel_values"]

    def _cut(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """Drops what exceeds `max_completion_length` from every run of learnt tokens."""
        if self.max_completion_length is None:
            return ids, labels
        run, kept = 0, []
        for index, label in enumerate(labels):
            run = 0 if label == IGNORED else run + 1
            if run <= self.max_completion_length:
                kept.append(index)
        return [ids[i] for i in kept], [labels[i] for i in kept]

    def _pad(self, sequences: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(ids) for ids, _ in sequences)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = len(sequences), length
        batch = {
            "input_ids": torch.full(shape, self.processor.tokenizer.pad_token_id),
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
    Rows for BLIP-2 with an encoder–decoder language model: image and prompt are encoded, the answer is decoded.

    Its processor puts the image tokens in front of the prompt itself, so placeholders, and the `<Img>` marks around
    them, are taken out of it. One question and its answer may come as messages too. The decoder's own end mark closes
    every answer that fits.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        rows = [self._normalise(example, index) for index, example in enumerate(examples)]
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
        answers = tokenizer(
            [row["completion"].strip() for row in rows],
            truncation=self.max_completion_length is not None,
            max_length=self.max_completion_length,
        )["input_ids"]
        for row, ids in zip(rows, answers):
            if all(token in (tokenizer.eos_token_id, tokenizer.pad_token_id) for token in ids):
                raise ValueError(f"Nothing of a row is left to learn, because its answer is empty: {_shown(row)}.")
        labels = torch.full((len(rows), max(map(len, answers))), IGNORED)
        for row_index, ids in enumerate(answers):
            labels[row_index, : len(ids)] = torch.tensor(ids)
        return {**inputs, "labels": labels}

    def _normalise(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        row = super()._normalise(example, index)
        if "messages" in row:
            turns = [(turn["role"], _text(turn)) for turn in row["messages"]]
            if [role for role, _ in turns] == ["user", "assistant"]:
                return {"images": row["images"], "prompt": turns[0][1], "completion": turns[1][1]}
        else:
            prompt = example["prompt"].replace(f"<Img>{IMAGE_PLACEHOLDER}</Img>", "").replace(IMAGE_PLACEHOLDER, "")
            row["prompt"] = prompt.strip()
        return row


def make_collator(
    model: torch.nn.Module,
    processor: ProcessorMixin,
    max_completion_length: int | None = None,
    chat_template: str | None = None,
) -> ImageTextCollator:
    """
    The collator that a model's loss needs.

    Raises:
        ValueError: for BLIP-2 with a decoder-only language model, whose processor cannot take prompt and answer apart.
    """
    config: Any = model.config
    if getattr(config, "model_type", None) != "blip-2":
        return ImageTextCollator(processor, max_completion_length=max_completion_length, chat_template=chat_template)
    if getattr(config, "use_decoder_only_language_model", False):
        raise ValueError(
            "BLIP-2 with a decoder-only language model (OPT) is not supported here. Take one with FlanT5, or compose "
            "a MiniGPT-4 with that language model."
        )
    return EncoderDecoderCollator(processor, max_completion_length=max_completion_length)


def _text(message: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def _decoded(image: Any) -> Any:
    """A picture that a source left undecoded (`{"bytes", "path"}`) as PIL image; others as they are."""
    if isinstance(image, dict):
        return load_image(image["path"] if image.get("bytes") is None else image["bytes"])
    return image


def _structured(messages: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """Contents as lists of parts; where no message places the pictures, they stand before the first question."""
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        # Arrow fills the keys of one part into all others.
        parts = [{key: value for key, value in part.items() if value is not None} for part in parts]
        turns.append({"role": message["role"], "content": parts})
    if not any(part["type"] == "image" for turn in turns for part in turn["content"]):
        question = next((turn for turn in turns if turn["role"] == "user"), None)
        if question is not None:
            question["content"] = [*({"type": "image"} for _ in range(images)), *question["content"]]
    return turns


def _unpadded(batch) -> tuple[list[tuple[list[int], list[int]]], torch.Tensor | None]:
    """Ids and labels of the positions that the attention mask keeps, row by row, and the pictures."""
    rows = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool()):
        rows.append((ids[mask].tolist(), labels[mask].tolist()))
    return rows, batch.get("pixel_values")


def _shown(row: dict[str, Any]) -> str:
    """A row without its pictures, short enough for an error."""
    text = str({key: value for key, value in row.items() if key not in ("image", "images")})
    return text if len(text) <= 200 else text[:200] + "…"
