"""Processor of LLaVA with its authors' prompt formats, which tokenizes texts around images as their code does."""

import re
from typing import Any

from transformers import LlavaProcessor, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from .answers_minigpt4 import Messages, NoEndMarkError, find_answers, learned_tokens
from .chat_templates_minigpt4 import with_end_marks
from .prompt_formats_llava import IMAGE, PROMPT_FORMATS, Written, stop_strings, template_of, turn_of, write


_PREFIX = "▁"  # sentencepiece's space, which it puts in front of every text
_TAGS = "<im_start>{}<im_end>"  # around images, for checkpoints that were trained with `mm_use_im_start_end`
# Two turns, to try a chat template on.
_CONVERSATION = (
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]},
    {"role": "user", "content": [{"type": "text", "text": "And what color is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It is red."}]},
)


def image_positions(processor: LlavaProcessor) -> int:
    """Positions per image of a processor that brings all images to one size."""
    image_processor = processor.image_processor
    crops = getattr(image_processor, "do_center_crop", False) and image_processor.crop_size
    size = dict(crops or image_processor.size)
    height = size.get("height") or size["shortest_edge"]
    width = size.get("width") or size["shortest_edge"]
    patches = (height // processor.patch_size) * (width // processor.patch_size)
    left_out = processor.vision_feature_select_strategy == "default"
    return int(patches + processor.num_additional_image_tokens - left_out)


def encode_by_template(
    processor: LlavaProcessor, messages: Messages, chat_template: str
) -> tuple[list[int], list[bool]]:
    """
    The ids of a conversation that a chat template writes, and which of them are learned, in one piece.

    Args:
        processor (`LlavaProcessor`): LLaVA's.
        messages (`list[dict]`): Roles and contents.
        chat_template (`str`): A template. Where it prints nothing after an answer, `</s>` is added and learned.

    Raises:
        ValueError: for a conversation in which answers cannot be told from the rest.
    """
    try:
        conversation = find_answers(chat_template, messages, processor.tokenizer)
    except NoEndMarkError:
        conversation = find_answers(with_end_marks(chat_template), messages, processor.tokenizer)
    return learned_tokens(conversation, processor.tokenizer, processor.image_token, image_positions(processor))


def check_template(processor: LlavaProcessor, chat_template: str) -> None:
    """
    Checks that conversations can be learned as a chat template writes them, on a conversation of two turns.

    Raises:
        ValueError: for a template in which answers cannot be found, or that prints no image tokens.
    """
    ids, learned = encode_by_template(processor, _CONVERSATION, chat_template)
    found, expected = ids.count(processor.image_token_id), image_positions(processor)
    if found != expected:
        raise ValueError(
            f"The chat template prints {found} image tokens for an image of {expected}. Print {processor.image_token} "
            "once for each image of a user message."
        )
    if not any(learned):
        raise ValueError("The chat template marks no answer by {% generation %}. Mark all, or remove the marks.")


class LlavaPromptProcessor(LlavaProcessor):
    """
    transformers' processor of LLaVA with one of the authors' prompt formats, for training and for chats.

    The authors tokenize the text before, between and after images piece by piece, and sentencepiece puts its `▁` in
    front of each piece. So does this processor, with any tokenizer that has the `▁`; others are used as they are.

    Args:
        image_processor (`BaseImageProcessor`): CLIP's, or LLaVA's own, which pads images with `do_pad=True`.
        tokenizer (`PreTrainedTokenizerBase`): The language model's. `<image>` is added if it is missing.
        patch_size (`int`): Of the vision tower, in pixels.
        vision_feature_select_strategy (`str`): `"default"` without the class token, or `"full"`, as in the config.
        chat_template (`str`, *optional*): By default that of the prompt format. With another one, conversations are
            trained as it writes them.
        num_additional_image_tokens (`int`, *optional*, defaults to 1): The tower's class token.
        prompt_format (`str`, *optional*, defaults to `"llava_v1"`): One of `PROMPT_FORMATS`.
        legacy (`bool`, *optional*):
            Whether `▁` is also put in front of a text after a special token such as `</s>`, as slow LLaMA tokenizers
            do with `legacy=True`. By default what the tokenizer says of itself.
        image_start_end (`bool`, *optional*, defaults to `False`): Whether images are written `<im_start>…<im_end>`.

    Raises:
        ValueError: for an unknown prompt format.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = "default",
        chat_template: str | None = None,
        image_token: str = IMAGE,
        num_additional_image_tokens: int = 1,
        prompt_format: str = "llava_v1",
        legacy: bool | None = None,
        image_start_end: bool = False,
        **kwargs: Any,
    ) -> None:
        if image_processor is None or tokenizer is None or patch_size is None:
            raise ValueError("LlavaPromptProcessor needs an image_processor, a tokenizer and a patch_size.")
        if prompt_format not in PROMPT_FORMATS:
            raise ValueError(f"prompt_format is {prompt_format!r}; choose one of {', '.join(PROMPT_FORMATS)}.")
        if image_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        tokenizer.padding_side = "left"  # for `generate`; trainers set their own
        self.prompt_format = prompt_format
        self.legacy = bool(getattr(tokenizer, "legacy", True)) if legacy is None else legacy
        self.image_start_end = image_start_end
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template or template_of(prompt_format, self._mark(image_token)),
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    @classmethod
    def of(cls, processor: LlavaProcessor, prompt_format: str, patch_size: int) -> "LlavaPromptProcessor":
        """
        A processor of LLaVA with an authors' prompt format in place of its own chat template.

        Args:
            processor (`LlavaProcessor`): One of transformers, or of this class.
            prompt_format (`str`): One of `PROMPT_FORMATS`.
            patch_size (`int`): Of the vision tower, for processors that do not say it.
        """
        return cls(
            processor.image_processor,
            processor.tokenizer,
            patch_size=processor.patch_size or patch_size,
            vision_feature_select_strategy=processor.vision_feature_select_strategy or "default",
            image_token=processor.image_token,
            num_additional_image_tokens=processor.num_additional_image_tokens,
            prompt_format=prompt_format,
            legacy=getattr(processor, "legacy", None),
            image_start_end=getattr(processor, "image_start_end", False),
        )

    @property
    def stop_strings(self) -> list[str]:
        """What ends an answer besides the end-of-sequence token."""
        return stop_strings(self.prompt_format) if self.has_own_template else []

    @property
    def answer_opening(self) -> str:
        """What training learns in front of an answer, and a prompt ends with."""
        own = self.has_own_template and PROMPT_FORMATS[self.prompt_format].style == "single"
        return "### Assistant:" if own else ""

    @property
    def has_own_template(self) -> bool:
        """Whether the chat template is that of the prompt format."""
        return bool(self.chat_template == template_of(self.prompt_format, self._mark(self.image_token)))

    def writes(self, prompt_format: str) -> bool:
        """Whether this is the prompt format, and the chat template is its own."""
        return self.has_own_template and self.prompt_format == prompt_format

    @property
    def image_seq_length(self) -> int:
        """Positions per image."""
        return image_positions(self)

    def _mark(self, image_token: str) -> str:
        return _TAGS.format(image_token) if self.image_start_end else image_token

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        images, text, *rest = super().prepare_inputs_layout(images, text, *args, **kwargs)
        if text is not None:
            text = [self._with_prefixes(prompt) if isinstance(prompt, str) else prompt for prompt in text]
        return images, text, *rest

    def _with_prefixes(self, text: str) -> str:
        """
        A text with `▁` wherever the authors' tokenizer puts one, for a tokenizer that puts one at most at the start.

        At the start of a text that has no `▁` yet, such tokenizers leave out nothing that is written here.
        """
        if _PREFIX not in self.tokenizer.get_vocab():
            return text
        mark = str(self.image_token)
        return mark.join(self._with_prefix(piece) for piece in text.split(mark))

    def _with_prefix(self, piece: str) -> str:
        if not piece:
            return piece
        if not self.legacy:
            named = self.tokenizer.all_special_tokens
            return piece if piece.startswith(tuple(set(named) - {self.image_token})) else _PREFIX + piece
        special = "|".join(re.escape(token) for token in self.tokenizer.get_added_vocab())
        parts = re.split(f"({special})", piece)  # texts are at even places
        return "".join(_PREFIX + part if part and place % 2 == 0 else part for place, part in enumerate(parts))

    def encode_conversation(
        self, messages: Messages, chat_template: str | None = None, max_length: int | None = None
    ) -> tuple[list[int], list[bool]]:
        """
        The ids of a conversation as training reads it, and which of them are learned: answers with what ends them.

        With the authors' prompt formats both equal their code's. With a chat template of another origin, the
        conversation is written by it and its answers are learned with their end mark.

        Args:
            messages (`list[dict]`): Roles and contents; the images themselves are not needed.
            chat_template (`str`, *optional*): By default the processor's own.
            max_length (`int`, *optional*):
                Tokens, an image counted as one, after which the caller cuts the row. What cannot be learned there is
                no error, as in the authors' script; nothing is cut here.

        Returns:
            `tuple[list[int], list[bool]]`: Ids with `image_seq_length` placeholders per image, and whether each is
            learned.

        Raises:
            ValueError: for a conversation in which answers cannot be told from the rest.
        """
        if chat_template is not None or not self.has_own_template:
            return encode_by_template(self, messages, str(chat_template or self.chat_template))
        written = self._write(messages)
        ids, spans = self._tokenize(written.text)
        learned = [any(a < end and start < b for a, b in written.learned) for start, end in spans]
        if written.fault is not None:
            before = sum(end <= written.good for _, end in spans)
            if max_length is None or before < max_length:
                raise ValueError(f"{written.fault}: {written.text[-120:]!r}")
        each = [self.image_seq_length if id_ == self.image_token_id else 1 for id_ in ids]
        return (
            [id_ for id_, count in zip(ids, each) for _ in range(count)],
            [learns for learns, count in zip(learned, each) for _ in range(count)],
        )

    def _write(self, messages: Messages) -> Written:
        system = None
        if messages and messages[0]["role"] == "system":
            system, messages = turn_of(messages[0], tagged=False)[1], messages[1:]
        tagged = PROMPT_FORMATS[self.prompt_format].tagged
        turns = [turn_of(message, tagged, self._mark(self.image_token)) for message in messages]
        return write(self.prompt_format, turns, system)

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, with one for each image, and the characters of each in a text."""
        prefixed = self._with_prefixes(text)
        encoded = self.tokenizer(prefixed, return_offsets_mapping=True)
        # Places in the text without the characters that were put in.
        places, place = [], 0
        for character in prefixed:
            places.append(place)
            place += place < len(text) and character == text[place]
        places.append(place)
        return list(encoded["input_ids"]), [(places[a], places[b]) for a, b in encoded["offset_mapping"]]

    def check_trainable(self) -> None:
        """
        Checks that conversations can be learned with the processor's chat template, see [`check_template`].

        Raises:
            ValueError: for a template in which answers cannot be found, or that prints no image tokens.
        """
        if not self.has_own_template:
            check_template(self, str(self.chat_template))

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """
        Turns generated ids, without those of the prompt, into answers: without the stop string and what follows it.

        Args:
            generated_outputs (`torch.Tensor` of shape `(B, new tokens)` or `list[list[int]]`): The new ids.
            skip_special_tokens (`bool`, *optional*, defaults to `True`): Whether to leave out special tokens.
        """
        texts: list[str] = self.tokenizer.batch_decode(
            generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
        )
        for stop in self.stop_strings:
            texts = [text.split(stop, 1)[0] for text in texts]
        return [text.strip() for text in texts]


__all__ = ["LlavaPromptProcessor"]
