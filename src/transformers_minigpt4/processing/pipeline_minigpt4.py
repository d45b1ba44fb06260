"""The pipeline of MiniGPT-4: pictures alone, pictures with a question, or chats in; text out."""

import os

from transformers import ImageTextToTextPipeline, Pipeline
from transformers.image_utils import valid_images
from transformers.pipelines.image_text_to_text import ReturnType
from transformers.utils.chat_template_utils import Chat


DEFAULT_PROMPT = "Describe this image in detail."  # first of the paper's stage-2 instructions (§3.3)


class MiniGPT4ImageToTextPipeline(ImageTextToTextPipeline):
    """
    `image-to-text` and `image-text-to-text` for MiniGPT-4.

    `pipe(picture)` describes the picture with [`DEFAULT_PROMPT`] or `prompt`, and returns
    `[{"generated_text": text}]`; a list of pictures gives a list of such lists, and a data set or generator of
    pictures an iterator of them. With `text` or a chat it behaves as
    [`ImageTextToTextPipeline`] does, except that a question without `<ImageHere>` is asked as a chat about its images.

    Building it with another model gives that model the stock pipeline, so that it can stand in the task table.
    """

    def __new__(cls, model=None, *args, **kwargs):
        if getattr(getattr(model, "config", None), "model_type", "minigpt4") != "minigpt4":
            return ImageTextToTextPipeline(model, *args, **kwargs)
        return super().__new__(cls)

    def check_model_type(self, supported_models) -> None:
        """The tables know this class only where the package is imported; it always fits its own pipeline."""

    def __init__(self, *args, prompt: str = DEFAULT_PROMPT, **kwargs):
        super().__init__(*args, **kwargs)
        self.prompt = prompt

    def __call__(self, images=None, text=None, prompt: str | None = None, **kwargs):
        prompt = self.prompt if prompt is None else prompt
        if isinstance(images, (list, tuple)) and not images:
            raise ValueError("The list of pictures is empty. Give at least one.")
        if text is None and images is not None and not _is_chat(images):
            if isinstance(images, (list, tuple)):
                return Pipeline.__call__(self, [_about(item, prompt) for item in images], **kwargs)
            if isinstance(images, dict) or _is_image(images):
                return Pipeline.__call__(self, _about(images, prompt), **kwargs)
            return Pipeline.__call__(self, (_about(item, prompt) for item in images), **kwargs)  # data set, generator
        if isinstance(text, str) and images is not None and self.processor.image_token not in text:
            pictures = images if isinstance(images, (list, tuple)) else [images]
            return super().__call__(text=_ask(*pictures, text), **kwargs)
        return super().__call__(images, text, **kwargs)

    def postprocess(self, model_outputs, return_type=ReturnType.FULL_TEXT, **kwargs):
        if return_type != ReturnType.TENSORS:
            # The answer is cut at its stop mark, and the prompt holds stop marks too: decode the new ids alone.
            prompt_ids = model_outputs["input_ids"]
            model_outputs = {
                **model_outputs,
                "generated_sequence": model_outputs["generated_sequence"][..., prompt_ids.shape[1] :],
                "input_ids": prompt_ids[:, :0],
            }
            if isinstance(model_outputs["prompt_text"], ImageAlone):
                records = super().postprocess(model_outputs, return_type=ReturnType.NEW_TEXT, **kwargs)
                return [{"generated_text": record["generated_text"]} for record in records]
        return super().postprocess(model_outputs, return_type=return_type, **kwargs)


class ImageAlone(Chat):
    """A picture that came without text, with the prompt put to it."""


def _is_chat(inputs) -> bool:
    """A list of messages, or of such lists."""
    while isinstance(inputs, (list, tuple)) and inputs:
        inputs = inputs[0]
    return isinstance(inputs, dict) and "role" in inputs


def _about(item, prompt: str):
    """A picture as a chat about it; what is no picture (`{"images": …, "text": …}`) as it is."""
    return ImageAlone(_ask(item, prompt)) if _is_image(item) else item


def _is_image(item) -> bool:
    return isinstance(item, (str, bytes, os.PathLike)) or bool(valid_images(item))


def _ask(*parts) -> list[dict]:
    """A chat of one user message; the last part is its text."""
    content = [{"type": "image", "image": image} for image in parts[:-1]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": parts[-1]}]}]
