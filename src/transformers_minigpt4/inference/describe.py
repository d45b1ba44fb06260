"""Captions many images with any image-text-to-text model: batched, loaded ahead, into a file that can be resumed."""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from PIL import Image
from transformers import ProcessorMixin

from transformers_minigpt4.processing.image_utils_minigpt4 import DEFAULT_TIMEOUT, ImageLoadError, load_image
from transformers_minigpt4.processing.pipeline_minigpt4 import DEFAULT_PROMPT
from transformers_minigpt4.utils.files import JsonLinesWriter, PathLike
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


class CaptionFile:
    """
    An append-only JSON Lines file of captions that a later run resumes.

    Each line is complete in itself, `{"image": ..., "caption": ..., "prompt": ..., "model": ...}`, and on the disk
    when [`append`] returns. Images that failed are not written, so the next run tries them again.

    Args:
        path (`str` or `os.PathLike`): the file; created if it does not exist.
        prompt (`str`): this run's prompt.
        model (`str`): this run's model.

    Raises:
        ValueError: on entry, if the file holds captions of another model or prompt, or anything but captions.
        OSError: on entry, if the file cannot be opened for reading and writing.
    """

    def __init__(self, path: PathLike, prompt: str, model: str) -> None:
        self.path, self.prompt, self.model = Path(path), prompt, model
        self.done: set[str] = set()
        self._lines = JsonLinesWriter(path, self._read_back, _is_cut_record)

    def __enter__(self) -> "CaptionFile":
        if not self.path.parent.is_dir():
            raise ValueError(
                f"cannot write {str(self.path)!r}: there is no folder {str(self.path.parent)!r}; create it"
            )
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"cannot write {str(self.path)!r}: it is not a regular file; choose another --output")
        self._lines.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.__exit__(*_)

    def append(self, record: dict[str, str]) -> None:
        """Write one record of [`describe`] that has a caption; it is on the disk when this returns."""
        self._lines.append([{**record, "prompt": self.prompt, "model": self.model}])
        self.done.add(record["image"])

    def _read_back(self, number: int, line: bytes) -> None:
        """Note the image of a finished line."""
        record = _parse(line)
        if record is None:
            raise ValueError(f"line {number} of {str(self.path)!r} is not a caption record; choose another --output")
        for key, mine in (("model", self.model), ("prompt", self.prompt)):
            if record[key] != mine:
                raise ValueError(
                    f"{str(self.path)!r} was made with {key} {record[key]!r}, but this run has {key} {mine!r}; "
                    "use the same or choose another --output"
                )
        self.done.add(record["image"])


def _parse(line: bytes) -> dict[str, str] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    keys = ("image", "caption", "prompt", "model")
    return record if isinstance(record, dict) and all(isinstance(record.get(key), str) for key in keys) else None


def _is_cut_record(line: bytes) -> bool:
    """Whether a line can be the beginning of a record, so that dropping it cannot destroy somebody else's text."""
    start = b'{"image": "'
    return _parse(line) is None and (line.startswith(start) or start.startswith(line))
