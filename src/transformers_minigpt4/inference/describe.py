"""Captions many images with any image-text-to-text model: batched and loaded ahead."""

import os
from collections.abc import Iterable, Iterator

from transformers_minigpt4.processing.image_utils_minigpt4 import DEFAULT_TIMEOUT, ImageLoadError, load_image
from transformers_minigpt4.processing.pipeline_minigpt4 import DEFAULT_PROMPT

from .engines import Engine, Request, answer_items
from .sources import ImageSource


def describe(
    sources: Iterable[ImageSource],
    engine: Engine,
    *,
    prompt: str = DEFAULT_PROMPT,
    timeout: float | None = DEFAULT_TIMEOUT,
    **generate_kwargs: object,
) -> Iterator[dict[str, str]]:
    """
    Answer one prompt about each of many images, lazily and in order.

    While the model works, threads load the next images, so few are in memory at a time and `sources` may be endless.
    An image that cannot be loaded gives a record with the error.

    Args:
        sources (`Iterable`): what [`~processing.image_utils_minigpt4.load_image`] takes.
        engine (`Engine`): a model as [`~inference.loading.load_engine`] loads it, or
            [`~inference.engines.TransformersEngine`] around one that is loaded already.
        prompt (`str`, *optional*): the question, without image placeholder: one user turn about one image.
        timeout (`float`, *optional*, defaults to 30): seconds that a download may take.
        generate_kwargs: as of `generate`; by default the checkpoint's generation config applies.

    Yields:
        `dict[str, str]`: `{"image": source, "caption": answer}`, or `{"image": source, "error": reason}`. `source` is
        the path or URL as given, or its number counted from 0 (`"#3"`) if the source is neither.

    Raises:
        ValueError: if `prompt` is empty.

    Example:

    ```python
    >>> from transformers_minigpt4.inference.describe import describe
    >>> from transformers_minigpt4.inference.loading import load_engine

    >>> engine = load_engine("transformers", "my-checkpoint", batch_size=16)  # doctest: +SKIP
    >>> for record in describe(["a.jpg", "b.jpg"], engine, do_sample=False):  # doctest: +SKIP
    ...     print(record["image"], record.get("caption", "failed"))
    ```
    """
    check_prompt(prompt)

    def request(named: tuple[str, ImageSource]) -> Request:
        return Request([load_image(named[1], timeout=timeout)], prompt)

    named = (
        (os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"#{number}", source)
        for number, source in enumerate(sources)
    )
    return (
        {"image": name, "error" if isinstance(answer, ImageLoadError) else "caption": str(answer)}
        for (name, _), answer in answer_items(named, request, engine, **generate_kwargs)
    )


def check_prompt(prompt: str) -> None:
    """
    Raises:
        ValueError: for a prompt without a text.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; ask something, such as 'Describe this image in detail.'")
