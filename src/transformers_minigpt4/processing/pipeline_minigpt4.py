"""The pipeline of MiniGPT-4: images alone, images with a question, or chats in; text out."""

import os
from collections.abc import Callable
from typing import Any, TypeAlias

from transformers import ImageTextToTextPipeline, Pipeline
from transformers.image_utils import valid_images
from transformers.pipelines.image_text_to_text import ReturnType
from transformers.utils.chat_template_utils import Chat

from .image_utils_minigpt4 import DEFAULT_TIMEOUT, load_image


DEFAULT_PROMPT = "Describe this image in detail."  # first of the paper's stage-2 instructions (§3.3)
Message: TypeAlias = dict[str, object]


class MiniGPT4ImageToTextPipeline(ImageTextToTextPipeline):
    """
    `image-to-text` and `image-text-to-text` for MiniGPT-4.

    `pipe(image)` describes the image with [`DEFAULT_PROMPT`] or `prompt`, and returns `[{"generated_text": text}]`; a
    list of images gives a list of such lists, and a dataset or generator of images an iterator of them. With `text` or
    a chat it behaves like [`ImageTextToTextPipeline`], except that a question without `<ImageHere>` is asked as a chat
    about its images.

    Building it with another model gives that model the stock pipeline, so that it can replace that in the task table.
    """

    before_stock: Callable[[], None] | None = None  # called when another model gets the stock pipeline

    def __new__(cls, model: object = None, *args: object, **kwargs: object) -> Any:
        if getattr(getattr(model, "config", None), "model_type", "minigpt4") != "minigpt4":
            if cls.before_stock is not None:
                cls.before_stock()
            return ImageTextToTextPipeline(model, *args, **kwargs)
        return super().__new__(cls)

    def check_model_type(self, supported_models: object) -> None:
        """The tables list this class only where the package is imported; it always fits its own pipeline."""

    def __init__(self, *args: object, prompt: str = DEFAULT_PROMPT, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.prompt = prompt

    def __call__(  # type: ignore[override]  # transformers' overloads call the first argument `image`
        self, images: Any = None, text: Any = None, prompt: str | None = None, **kwargs: object
    ) -> Any:
        prompt = self.prompt if prompt is None else prompt
        if isinstance(images, (list, tuple)) and not images:
            raise ValueError("The list of images is empty. Give at least one.")
        if text is None and images is not None and not _is_chat(images):
            if isinstance(images, (list, tuple)):
                return Pipeline.__call__(self, [_about(item, prompt) for item in images], **kwargs)
            if isinstance(images, dict) or _is_image(images):
                return Pipeline.__call__(self, _about(images, prompt), **kwargs)
            return Pipeline.__call__(self, (_about(item, prompt) for item in images), **kwargs)  # dataset, generator
        if isinstance(text, str) and images is not None and getattr(self.processor, "image_token", "") not in text:
            about = images if isinstance(images, (list, tuple)) else [images]
            images, text = None, _ask(*about, text)
        return super().__call__(images, text, **kwargs)

    def preprocess(self, inputs: Any, timeout: float | None = DEFAULT_TIMEOUT, **kwargs: Any) -> Any:  # type: ignore[override]
        # transformers' own loader takes any format, among them EPS, for which PIL starts Ghostscript.
        if isinstance(inputs, dict) and "images" in inputs:
            inputs = {**inputs, "images": _loaded(inputs["images"], timeout)}
        return super().preprocess(inputs, timeout, **kwargs)

    def postprocess(  # type: ignore[override]  # so does transformers' own class override its base
        self,
        model_outputs: dict[str, Any],
        return_type: ReturnType = ReturnType.FULL_TEXT,
        *args: Any,
        **kwargs: Any,
    ) -> list[dict[str, object]]:
        image_alone = False
        if return_type != ReturnType.TENSORS:
            # The answer is cut at its stop string, and the prompt contains stop strings too: decode the new ids alone.
            prompt_ids = model_outputs["input_ids"]
            image_alone = isinstance(model_outputs["prompt_text"], ImageAlone)
            model_outputs = {
                **model_outputs,
                "generated_sequence": model_outputs["generated_sequence"][..., prompt_ids.shape[1] :],
                "input_ids": prompt_ids[:, :0],
            }
        kind = ReturnType.NEW_TEXT if image_alone else return_type
        records: list[dict[str, object]] = super().postprocess(model_outputs, kind, *args, **kwargs)
        return [{"generated_text": record["generated_text"]} for record in records] if image_alone else records


class ImageAlone(Chat):
    """An image that came without text, with the prompt put to it."""


def _loaded(images: Any, timeout: float | None) -> Any:
    if isinstance(images, (list, tuple)):
        return [_loaded(image, timeout) for image in images]
    return load_image(images, timeout) if isinstance(images, (str, bytes, os.PathLike)) else images


def _is_chat(inputs: object) -> bool:
    """Whether something is a list of messages, or of such lists."""
    while isinstance(inputs, (list, tuple)) and inputs:
        inputs = inputs[0]
    return isinstance(inputs, dict) and "role" in inputs


def _about(item: object, prompt: str) -> object:
    """An image as a chat about it; anything else (`{"images": …, "text": …}`) as it is."""
    chat: Any = _ask(item, prompt)
    return ImageAlone(chat) if _is_image(item) else item


def _is_image(item: object) -> bool:
    return isinstance(item, (str, bytes, os.PathLike)) or bool(valid_images(item))


def _ask(*parts: object) -> list[Message]:
    """A chat of one user message with images and, last, a text."""
    content = [{"type": "image", "image": image} for image in parts[:-1]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": parts[-1]}]}]
