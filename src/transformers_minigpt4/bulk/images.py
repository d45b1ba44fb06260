"""Images to be described, each with the identity that its caption is kept under, and their answers."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from transformers_minigpt4.inference.engines import Engine, Request, answer_items
from transformers_minigpt4.inference.sources import is_url
from transformers_minigpt4.processing.image_utils_minigpt4 import (
    DEFAULT_TIMEOUT,
    ImageLoadError,
    download_image,
    load_image,
)


_KIND = re.compile(r"\w{2,}:(?!//)")  # in front of a path; a single letter would be a drive


@dataclass
class BulkImage:
    """
    An image that is to be described.

    Args:
        key (`str`): what it is known by, in captions and messages: its path or URL, or shard and row.
        source (`str`, `bytes` or `ImageLoadError`): a path or URL, the content of a file, or why there is none.
        stem (`str`, *optional*): its name in a shard, for sources that have such names.
        content (`bytes`, *optional*): of its file, once it has been read to be kept.
    """

    key: str
    source: str | bytes | ImageLoadError
    stem: str | None = None
    content: bytes | None = None


@dataclass(frozen=True)
class Description:
    """
    What became of an image: the caption, or the error in its place.

    Args:
        image (`BulkImage`): which; with its content if that is to be kept.
        caption, error (`str`, *optional*): one of the two.
    """

    image: BulkImage
    caption: str | None = None
    error: str | None = None


def describe_images(
    images: Iterable[BulkImage],
    engine: Engine,
    *,
    prompt: str,
    keep_content: bool = False,
    timeout: float | None = DEFAULT_TIMEOUT,
    **generate_kwargs: object,
) -> Iterator[Description]:
    """
    Answer one prompt about each of many images, lazily and in order, while threads read the next ones.

    Args:
        images (`Iterable[BulkImage]`): may be endless.
        engine (`Engine`): answers.
        prompt (`str`): the question, without image placeholder: one user turn about one image.
        keep_content (`bool`, *optional*, defaults to `False`): whether descriptions come with the images' files.
        timeout (`float`, *optional*, defaults to 30): seconds that a download may take.
        generate_kwargs: as of `generate`; by default the checkpoint's generation config applies.

    Yields:
        `Description`: one for each image.
    """

    def request(image: BulkImage) -> Request:
        source = image.source
        if isinstance(source, ImageLoadError):
            raise source
        if keep_content and isinstance(source, str) and is_url(source):
            source = download_image(source, timeout)
        try:
            loaded = load_image(source, timeout=timeout)
        except ImageLoadError as error:
            if source is image.source and isinstance(source, str):
                raise
            raise ImageLoadError(repr(image.key), error.reason, error.advice) from error
        if keep_content:
            image.content = source if isinstance(source, bytes) else Path(source).read_bytes()
        return Request([loaded], prompt)

    for image, answer in answer_items(images, request, engine, **generate_kwargs):
        if isinstance(answer, ImageLoadError):
            yield Description(replace(image, content=None), error=str(answer))
        else:
            yield Description(image, caption=answer)


def is_source(argument: str) -> bool:
    """Whether an argument is `KIND:PATH` as for training, and no file or URL."""
    return _KIND.match(argument) is not None and not is_url(argument) and not os.path.exists(argument)
