"""Captions many images with any image-text-to-text model: batched and loaded ahead."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice

from PIL import Image
from transformers import ProcessorMixin

from transformers_minigpt4.processing.image_utils_minigpt4 import DEFAULT_TIMEOUT, ImageLoadError, load_image
from transformers_minigpt4.processing.pipeline_minigpt4 import DEFAULT_PROMPT
from transformers_minigpt4.utils.loading import MAX_THREADS, load_ahead
from transformers_minigpt4.utils.models import GenerativeModel

from .generation import caption_images
from .sources import ImageSource


def describe(
    sources: Iterable[ImageSource],
    model: GenerativeModel,
    processor: ProcessorMixin,
    *,
    prompt: str = DEFAULT_PROMPT,
    batch_size: int = 8,
    timeout: float | None = DEFAULT_TIMEOUT,
    **generate_kwargs: object,
) -> Iterator[dict[str, str]]:
    """
    Answer one prompt about each of many images, lazily and in order.

    While the model works on a batch, threads load the next one, so at most two batches of images are in memory and
    `sources` may be endless. An image that cannot be loaded gives a record with the error and leaves its batch.

    Args:
        sources (`Iterable`): what [`~processing.image_utils_minigpt4.load_image`] takes.
        model (`PreTrainedModel`): any image-text-to-text model with `generate`.
        processor (`ProcessorMixin`): the model's processor; other threads may use it at the same time.
        prompt (`str`, *optional*): the question, without image placeholder: one user turn about one image.
        batch_size (`int`, *optional*, defaults to 8): images that go through the model at once.
        timeout (`float`, *optional*, defaults to 30): seconds that a download may take.
        generate_kwargs: passed on to `model.generate`; by default the checkpoint's generation config applies.

    Yields:
        `dict[str, str]`: `{"image": source, "caption": answer}`, or `{"image": source, "error": reason}`. `source` is
        the path or URL as given, or its number counted from 0 (`"#3"`) if the source is neither.

    Raises:
        ValueError: if `batch_size` is below 1 or `prompt` is empty.

    Example:

    ```python
    >>> from transformers_minigpt4.inference.describe import describe
    >>> from transformers_minigpt4.inference.loading import load_model_and_processor

    >>> model, processor = load_model_and_processor("my-checkpoint")  # doctest: +SKIP
    >>> for record in describe(["a.jpg", "b.jpg"], model, processor, do_sample=False):  # doctest: +SKIP
    ...     print(record["image"], record.get("caption", "failed"))
    ```
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; ask something, such as 'Describe this image in detail.'")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but a batch needs at least one image; set it to 1 or more")

    def load(named: tuple[str, ImageSource]) -> Image.Image | ImageLoadError:
        try:
            return load_image(named[1], timeout=timeout)
        except ImageLoadError as error:
            return error

    def records() -> Iterator[dict[str, str]]:
        for loaded in load_ahead(_named_batches(sources, batch_size), load, min(batch_size, MAX_THREADS)):
            images = [image for _, image in loaded if isinstance(image, Image.Image)]
            captions = iter(caption_images(images, model, processor, prompt, **generate_kwargs) if images else ())
            for (name, _), image in loaded:
                if isinstance(image, ImageLoadError):
                    yield {"image": name, "error": str(image)}
                else:
                    yield {"image": name, "caption": next(captions)}

    return records()


def _named_batches(sources: Iterable[ImageSource], batch_size: int) -> Iterator[list[tuple[str, ImageSource]]]:
    named = (
        (os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"#{number}", source)
        for number, source in enumerate(sources)
    )
    return iter(lambda: list(islice(named, batch_size)), [])
