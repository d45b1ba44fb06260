"""Processor of MiniGPT-4: images, prompts and chats in; token ids and pixels out; and answers back to text."""

import os
from typing import Any

import torch
import transformers
from packaging import version
from PIL.Image import Image
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import auto_docstring

from .answers_minigpt4 import Conversation, Messages, find_answers, learned_tokens, marked_answers
from .chat_templates_minigpt4 import CHAT_TEMPLATES, TRAINING_TEMPLATES, VICUNA_V0, is_authors, with_images
from .image_utils_minigpt4 import load_image
from .pipeline_minigpt4 import MiniGPT4ImageToTextPipeline


# The settings of the authors' chat (`Chat.answer_prepare`); the transformers of 2023 applied top-k 50 by default.
AUTHORS_SAMPLING: dict[str, object] = {
    "do_sample": True,
    "top_p": 0.9,
    "top_k": 50,
    "temperature": 1.0,
    "repetition_penalty": 1.05,
    "max_new_tokens": 300,
    "min_new_tokens": 1,
}
# Two turns, to try a chat template on.
_CONVERSATION = (
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]},
    {"role": "user", "content": [{"type": "text", "text": "And what color is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It is red."}]},
)


@auto_docstring
class MiniGPT4Processor(ProcessorMixin):
    text_kwargs = {"return_token_type_ids": False}
    image_token = "<ImageHere>"  # the authors' own placeholder; the chat templates write it

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_seq_length: int = 32,
        chat_template: str | dict[str, str] | None = None,
        stop_strings: list[str] | None = None,
        **kwargs: object,
    ):
        r"""
        image_processor (`BaseImageProcessor`):
            Resizes to the square that the vision tower takes (224 pixels, bicubic, no crop) and normalizes with
            CLIP's mean and standard deviation: `BlipImageProcessor(size={"height": 224, "width": 224})`.
        tokenizer (`PreTrainedTokenizerBase`):
            The language model's tokenizer. With the authors' templates, a LLaMA-style one is set to put its `▁` on
            every text segment, as in their code; the image token is added if it is missing (then call
            `model.resize_token_embeddings`).
        image_seq_length (`int`, *optional*, defaults to 32):
            Positions per image, `config.image_seq_length` of the model.
        chat_template (`str`, *optional*):
            A Jinja template, or `"vicuna_v0"` or `"llama_2"` for the authors' formats. By default the tokenizer's own
            template, and Vicuna v0 where the tokenizer has none. A template without `<ImageHere>` gets a frame that
            places images as `<Img><ImageHere></Img>`; one given here is saved without it.
        stop_strings (`list[str]`, *optional*):
            Strings that end an answer, in addition to the end-of-sequence token. By default `["###"]` with Vicuna v0's
            template, none with others.
        """
        if image_processor is None or tokenizer is None:
            missing = "image_processor" if image_processor is None else "tokenizer"
            raise ValueError(f"MiniGPT4Processor needs an image_processor and a tokenizer; {missing} is missing.")
        if chat_template is None:
            chat_template = _with_images(tokenizer.chat_template) if tokenizer.chat_template else VICUNA_V0
        elif isinstance(chat_template, str):
            chat_template = CHAT_TEMPLATES.get(chat_template, chat_template)
        if is_authors(chat_template):
            tokenizer = _prefix_every_segment(tokenizer)
        if self.image_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [self.image_token]}, replace_extra_special_tokens=False
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        tokenizer.padding_side = "left"  # for `generate`; trainers set their own
        self.image_seq_length = image_seq_length
        self.image_token_id = tokenizer.get_vocab()[self.image_token]
        if stop_strings is None:
            stop_strings = ["###"] if chat_template == VICUNA_V0 else []
        self.stop_strings = stop_strings
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, (list, tuple)) and not text:
            raise ValueError("The list of prompts is empty. Give at least one prompt.")
        if isinstance(images, (list, tuple)) and not any(
            len(image) if isinstance(image, (list, tuple)) else True for image in images
        ):
            images = None  # a batch of prompts without any image
        if images is not None:
            images = _upright_rgb(images)
        return super().prepare_inputs_layout(images, text, *args, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> None:
        super().validate_inputs(images, text, *args, **kwargs)
        self._check_totals(images, text)
        # A row with one image too many would pass it on to the next row.
        nested = isinstance(images, (list, tuple)) and images and isinstance(images[0], (list, tuple))
        if text is None or not nested:
            return
        if len(images) != len(text):
            raise ValueError(
                f"Got lists of images for {len(images)} prompts, but {len(text)} prompts. Give one list per prompt."
            )
        for row, (row_images, prompt) in enumerate(zip(images, text)):
            placeholders = prompt.count(self.image_token)
            if placeholders != len(row_images):
                raise ValueError(
                    f"Prompt {row} has {placeholders} {self.image_token} and {len(row_images)} images. "
                    "Give each prompt as many images as placeholders."
                )

    def _check_totals(self, images: Any, text: Any) -> None:
        """What `super` checks from transformers 5.23 on; before, a prompt could keep a bare placeholder."""
        if text is None:
            return
        prompts = [text] if isinstance(text, str) else text
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("`text` must be a string or list of strings.")
        placeholders = sum(prompt.count(self.image_token) for prompt in prompts)
        if images is None and placeholders:
            raise ValueError(f"Found {placeholders} {self.image_token} tokens in the text but no images were passed.")
        flat: Any = [] if images is None else make_flat_list_of_images(images)
        count = len(flat)
        if placeholders != count:
            raise ValueError(
                f"The prompts contain {placeholders} {self.image_token} tokens and {count} images were passed."
            )

    def replace_image_token(self, image_inputs: object, image_idx: int, **kwargs: object) -> str:
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(
        self, image_sizes: list[list[int]] | None = None, **kwargs: object
    ) -> MultiModalData:
        """Placeholder tokens for images of `image_sizes` (height, width): the same number for every size."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *args: Any,
        sanitize_control_tokens: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        See [`~ProcessorMixin.apply_chat_template`].

        Raises:
            ValueError: for a text that contains the image placeholder (pass images as parts of type `"image"`, or
                `sanitize_control_tokens=True` to read it as plain text), for a message without content, and for an
                option that the installed transformers is too old for.
        """
        batched = (
            isinstance(conversation, (list, tuple)) and conversation and isinstance(conversation[0], (list, tuple))
        )
        for chat in conversation if batched else [conversation]:
            if not chat or isinstance(chat, dict):
                raise ValueError(
                    f"The conversation is {chat!r}. Give a list of at least one message with role and content."
                )
            for message in chat:
                self._check_message(message, sanitize_control_tokens)
        if sanitize_control_tokens:
            _require("5.23", "sanitize_control_tokens")
            kwargs["sanitize_control_tokens"] = True
        template = chat_template or self.chat_template
        if isinstance(template, str) and "{" in template:  # otherwise it is the name of one of several
            chat_template = with_images(template)
        masked = kwargs.get("tokenize") and kwargs.get("return_dict") and kwargs.get("return_assistant_tokens_mask")
        if not masked or is_authors(self.chat_template) or sanitize_control_tokens:
            if masked:
                _require("5.18", "return_assistant_tokens_mask")  # before, images moved the mask off the answers
            return super().apply_chat_template(conversation, chat_template, *args, **kwargs)
        inputs = super().apply_chat_template(
            conversation, chat_template, *args, **{**kwargs, "return_assistant_tokens_mask": False}
        )
        return self._with_assistant_masks(inputs, conversation if batched else [conversation], chat_template)

    def _with_assistant_masks(self, inputs: Any, conversations: Any, chat_template: str | None) -> Any:
        """Adds masks of the answers, which templates need not mark, see [`~MiniGPT4Processor.encode_conversation`]."""
        masks = []
        for row, chat in enumerate(conversations):
            ids, learned = self.encode_conversation(chat, chat_template)
            kept = [bool(keeps) for keeps in inputs["attention_mask"][row]]
            found = [int(id_) for id_, keeps in zip(inputs["input_ids"][row], kept) if keeps]
            left_out = len(ids) - len(found)  # <s>, where the caller wants no special tokens
            if left_out not in (0, 1) or ids[left_out:] != found:
                raise ValueError(
                    "Answers can be masked in complete conversations only. Leave out add_generation_prompt, "
                    "truncation, tools and other values for the template."
                )
            answers = iter(learned[left_out:])
            masks.append([int(keeps and next(answers)) for keeps in kept])
        tensors = isinstance(inputs["input_ids"], torch.Tensor)
        inputs["assistant_masks"] = torch.tensor(masks) if tensors else masks
        return inputs

    def _check_message(self, message: object, sanitize_control_tokens: bool) -> None:
        example = '[{"type": "image", "image": image}, {"type": "text", "text": "Describe this image."}]'
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f'A message cannot be {message!r}. Give {{"role": "user", "content": {example}}}.')
        role, content = message["role"], message.get("content")
        parts = [{"type": "text", "text": content or ""}] if isinstance(content, (str, type(None))) else content
        if not all(isinstance(part, dict) and "type" in part for part in parts):
            raise ValueError(f"A {role} message contains a part without type: {parts}. Give parts such as {example}.")
        texts = [part.get("text") or "" for part in parts if part["type"] == "text"]
        # A message that calls a tool needs no words; TRL sends one to learn whether a template knows tools.
        if role != "system" and (not parts or not all(texts)) and not message.get("tool_calls"):
            raise ValueError(f"A {role} message is empty: {message}. Give it a text, or parts such as {example}.")
        if not sanitize_control_tokens and any(self.image_token in text for text in texts):
            raise ValueError(
                f"A {role} message contains the image placeholder {self.image_token} in its text. Pass images as "
                'parts of type "image", or sanitize_control_tokens=True to read it as plain text.'
            )

    def encode_conversation(
        self, messages: Messages, chat_template: str | None = None
    ) -> tuple[list[int], list[bool]]:
        """
        The ids of a conversation as training reads it, and which of them are learned: every answer with its end mark.

        With the authors' templates, answers and what is between them are tokenized separately, as in their code. With
        others, all is tokenized in one piece, as [`~MiniGPT4Processor.apply_chat_template`] tokenizes prompts.

        Args:
            messages (`list[dict]`): Roles and contents; the images themselves are not needed.
            chat_template (`str`, *optional*): By default the processor's own, or its variant for training.

        Returns:
            `tuple[list[int], list[bool]]`: Ids with `image_seq_length` placeholders per image, and whether each is
            learned.

        Raises:
            ValueError: for a conversation that the template refuses, or in which answers cannot be told from the rest.
        """
        template = chat_template or self.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not isinstance(template, str):
            raise ValueError("The processor has no default chat template. Set processor.chat_template.")
        if not is_authors(self.chat_template):
            conversation = find_answers(with_images(template), messages, self.tokenizer)
            return learned_tokens(conversation, self.tokenizer, self.image_token, self.image_seq_length)
        conversation = marked_answers(TRAINING_TEMPLATES.get(template, template), messages, self.tokenizer)
        return self._encode_segments(conversation)

    def _encode_segments(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        text, end = conversation.text, 0
        ids: list[int] = []
        learned: list[bool] = []
        for start, stop in [*conversation.answers, (len(text), len(text))]:
            for segment, is_answer in ((text[end:start], False), (text[start:stop], True)):
                expanded = segment.replace(self.image_token, self.image_token * self.image_seq_length)
                found = self.tokenizer(expanded, add_special_tokens=False)["input_ids"] if segment else []
                ids += found
                learned += [is_answer] * len(found)
            end = stop
        return ids, learned

    def check_trainable(self) -> None:
        """
        Checks that conversations can be learned with the processor's chat template, on a conversation of two turns.

        Raises:
            ValueError: for a template in which answers, or their ends, cannot be found.
        """
        ids, learned = self.encode_conversation(_CONVERSATION)
        if ids.count(self.image_token_id) != self.image_seq_length:
            raise ValueError(
                f"The chat template prints {ids.count(self.image_token_id)} image tokens for an image of "
                f"{self.image_seq_length}. Print {self.image_token} once for each image of a user message."
            )
        if not any(learned):
            raise ValueError("The chat template marks no answer by {% generation %}. Mark all, or remove the marks.")

    def _end_of_turn(self) -> int | None:
        """The token with which the chat template ends an answer, or `None` if that is no token of its own."""
        try:
            ids, learned = self.encode_conversation(_CONVERSATION)
        except ValueError:
            return None
        last = next((id_ for id_, learns in zip(reversed(ids), reversed(learned)) if learns), None)
        return last if last in self.tokenizer.get_added_vocab().values() else None

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str | list[str]:
        """
        See [`~ProcessorMixin.decode`]; with `skip_special_tokens=True`, a stop string at the end is left out too.

        Servers such as `transformers serve` make their answers with this method, and know no stop strings.
        """
        found = self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        if not skip_special_tokens:
            return found  # type: ignore[no-any-return]
        return self._without_end(found) if isinstance(found, str) else [self._without_end(text) for text in found]

    def _without_end(self, text: str) -> str:
        for stop in self.stop_strings:
            text = text.removesuffix(stop)
        return text

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """
        Turns generated ids into answers, without the stop string and what follows it.

        Args:
            generated_outputs (`torch.Tensor` of shape `(B, new tokens)` or `list[list[int]]`):
                The **new** ids alone: cut the prompt off, since it contains stop strings itself.
            skip_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether to leave out special tokens.

        Returns:
            `list[str]`: One answer per row.
        """
        texts: list[str] = self.tokenizer.batch_decode(
            generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
        )
        for stop in self.stop_strings:
            texts = [text.split(stop, 1)[0] for text in texts]
        return [text.strip() for text in texts]

    def get_generation_config(self, **kwargs: object) -> GenerationConfig:
        """
        Generation defaults of the authors' chat (`Chat.answer_prepare`) for this tokenizer, to save with a model.

        Sampling with top-p 0.9, temperature 1.0, repetition penalty 1.05, 1 to 300 new tokens; top-k 50, which the
        transformers of 2023 applied by default. Answers end at the end-of-sequence token, at the token with which the
        chat template ends them, and at every tokenization of `stop_strings`: those of one token are among
        `eos_token_id`, longer ones in `stop_sequences`. `stop` has the strings themselves, for servers that look for
        texts; transformers' own `stop_strings` would make `generate` ask for the tokenizer.

        Args:
            kwargs: Values that replace these defaults.
        """
        stops = [ids for stop in self.stop_strings for ids in self._tokenizations(stop)]
        ends = [self.tokenizer.eos_token_id, self._end_of_turn(), *self._tokens_with_stop_strings()]
        settings: dict[str, object] = {
            **AUTHORS_SAMPLING,
            "bos_token_id": self.tokenizer.bos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": [id_ for id_ in dict.fromkeys(ends) if id_ is not None],
            "stop_sequences": [ids for ids in stops if len(ids) > 1],
            "stop": list(self.stop_strings),
        }
        return GenerationConfig(**{**settings, **kwargs})

    def _tokens_with_stop_strings(self) -> list[int]:
        """Every token of the vocabulary that contains a stop string: the answer is cut there anyway."""
        as_text = self.tokenizer.convert_tokens_to_string
        vocabulary = self.tokenizer.get_vocab().items()
        return sorted(id_ for token, id_ in vocabulary if any(stop in as_text([token]) for stop in self.stop_strings))

    def _tokenizations(self, stop: str) -> list[list[int]]:
        """Ids of a stop string at the start of a text, after a word, and after a space, each once."""

        def encode(text: str) -> list[int]:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
            return ids

        found = [encode(stop)] + [encode(before + stop)[len(encode(before)) :] for before in ("a", ".", "a ")]
        unique: list[list[int]] = []
        for ids in found:
            if ids not in unique and self.tokenizer.decode(ids).strip() == stop:
                unique.append(ids)
        return unique

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        os.makedirs(save_directory, exist_ok=True)
        # `custom_pipelines` of the model's config names this file.
        custom_object_save(MiniGPT4ImageToTextPipeline, save_directory)
        files: list[str] = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        return files


def _require(minimum: str, option: str) -> None:
    """Raises ValueError where the installed transformers is older than an option needs."""
    if version.parse(transformers.__version__) < version.parse(minimum):
        raise ValueError(f"{option} needs transformers {minimum} or later; {transformers.__version__} is installed.")


def _upright_rgb(images: Any) -> Any:
    """Applies `load_image` to all paths, URLs, bytes and PIL images of a nested list; arrays and tensors stay."""
    if isinstance(images, (list, tuple)):
        return [_upright_rgb(image) for image in images]
    size = images.size if isinstance(images, Image) else getattr(images, "shape", (1,))
    if 0 in tuple(size):
        raise ValueError(f"An image has the size {tuple(size)}, that is, no pixels. Leave it out.")
    return load_image(images) if isinstance(images, (str, bytes, os.PathLike, Image)) else images


def _with_images(chat_template: str | dict[str, str]) -> str | dict[str, str]:
    if isinstance(chat_template, dict):
        return {name: with_images(template) for name, template in chat_template.items()}
    return with_images(chat_template)


def _prefix_every_segment(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    Gives a LLaMA-style tokenizer its `▁` on every text segment between special tokens.

    sentencepiece, and so the authors' code, puts it before each text that it is given, and they tokenize the text
    around images piece by piece. transformers' `LlamaTokenizer` puts it before the first alone, and not before a
    text that begins with a space. Other tokenizers are returned as they are.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        return tokenizer
    if backend.pre_tokenizer.prepend_scheme == "never":
        return tokenizer
    backend = type(backend).from_str(backend.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    # <unk>, which pads, is not a special token in the backend otherwise, and would stay in decoded answers.
    special = {tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token} - {None}
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in sorted(special)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


__all__ = ["MiniGPT4Processor"]
