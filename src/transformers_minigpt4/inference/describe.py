"""Captions many pictures with any image-text-to-text model: expands sources, batches, streams and resumes."""

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.generation.streamers import BaseStreamer

from transformers_minigpt4.processing.image_utils_minigpt4 import DEFAULT_TIMEOUT, ImageLoadError, load_image
from transformers_minigpt4.processing.pipeline_minigpt4 import DEFAULT_PROMPT


# The answer length of the authors' chat, for checkpoints whose generation config names none.
DEFAULT_MAX_NEW_TOKENS = 300
# What counts as a picture inside a folder. HEIC stands here though plain PIL cannot read it: it is then reported as
# failed, where leaving it out would lose a telephone's pictures without a word.
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".jp2", ".ppm", ".pgm", ".pbm", ".tga", ".ico"),
    )
)
_MAX_LOADING_THREADS = 16
_URL = re.compile(r"(https?|data):", re.IGNORECASE)
# Characters of scripts written without spaces, which a stream must not hold back until the next space.
_UNSPACED_SCRIPT = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")


def expand_sources(arguments: Iterable[str], stdin: TextIO | None = None) -> list[str]:
    """
    List the pictures that command-line arguments stand for, each once, in order.

    Args:
        arguments (`Iterable[str]`): files, URLs, folders (searched recursively for [`IMAGE_SUFFIXES`], sorted, hidden
            files left out) and `-` for a list of the same on `stdin`, one a line.
        stdin (`TextIO`, *optional*): where `-` is read from.

    Returns:
        `list[str]`: URLs as given and paths in normal form; a file that does not exist is listed all the same.

    Raises:
        ValueError: if a folder holds no picture, or `-` is given without `stdin`.
        OSError: if a folder cannot be read.
    """
    found: list[str] = []
    for argument in arguments:
        if argument == "-":
            if stdin is None:
                raise ValueError("'-' asks for a list of pictures on standard input, but there is none")
            lines = (line.rstrip("\r\n") for line in stdin)
            found.extend(expand_sources(line for line in lines if line.strip() and line != "-"))
        elif _URL.match(argument):
            found.append(argument)
        elif os.path.isdir(argument):
            pictures = _images_in(Path(argument))
            if not pictures:
                raise ValueError(f"{argument!r} holds no picture; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
            found.extend(pictures)
        else:
            found.append(str(Path(argument)))
    return list(dict.fromkeys(found))


def _images_in(folder: Path) -> list[str]:
    def stop(error: OSError) -> None:
        # os.walk skips folders that it cannot read unless told otherwise.
        raise error

    pictures: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        pictures += (
            Path(parent, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        )
    return [str(path) for path in sorted(pictures)]


def load_model_and_processor(
    checkpoint: str, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """
    Load an image-text-to-text model of any family for inference, with its processor.

    Args:
        checkpoint (`str`): a folder or a Hub id.
        dtype (`str`, *optional*, defaults to `"auto"`): `"auto"` for the checkpoint's own, or `"float32"` and so on.
        device (`str`, *optional*): such as `"cpu"` or `"cuda:1"`; `"auto"` spreads the model over all accelerators.
            Without it, the first accelerator if there is one, else the CPU.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code in the checkpoint may run.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: the model in evaluation mode, and its processor.

    Raises:
        ValueError: if the checkpoint cannot be found or is of another kind, or the device's name is none.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = str(accelerator) if accelerator is not None else "cpu"
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # of a device that is none, and of a torch without CUDA
            raise ValueError(
                f"cannot use the device {device!r}: {str(error).strip().splitlines()[0]}; name one that torch has "
                "here, or leave it out"
            ) from error
    if (os.path.isabs(checkpoint) or checkpoint.startswith(".")) and not os.path.isdir(checkpoint):
        # transformers would take it for a Hub id and complain about its characters.
        raise ValueError(f"there is no model folder {checkpoint!r}; check the path")
    try:
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, device_map=device, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"cannot load {checkpoint!r} as image-text-to-text model on {device!r}: {reason}; give a folder or Hub id "
            "that holds such a model and its processor"
        ) from error
    return model.eval(), processor


def describe(
    sources: Iterable[Any],
    model: Any,
    processor: Any,
    *,
    prompt: str = DEFAULT_PROMPT,
    batch_size: int = 8,
    timeout: float | None = DEFAULT_TIMEOUT,
    **generate_kwargs: Any,
) -> Iterator[dict[str, str]]:
    """
    Answer one prompt about each of many pictures, lazily and in order.

    While the model works on a batch, threads load the next one, so at most two batches of pictures are in memory and
    `sources` may be endless. A picture that cannot be loaded becomes a record of its own and leaves its batch.

    Args:
        sources (`Iterable`): what [`~processing.image_utils_minigpt4.load_image`] takes.
        model (`PreTrainedModel`): any image-text-to-text model with `generate`.
        processor (`ProcessorMixin`): the model's processor.
        prompt (`str`, *optional*): the question, without image placeholder: one user turn about one picture.
        batch_size (`int`, *optional*, defaults to 8): pictures that go through the model at once.
        timeout (`float`, *optional*, defaults to 30): seconds that a download may take.
        generate_kwargs: passed on to `model.generate`; by default the checkpoint's generation config rules.

    Yields:
        `dict[str, str]`: `{"image": source, "caption": answer}`, or `{"image": source, "error": reason}`. `source` is
        the path or URL as given, and the number counted from 0 (`"#3"`) where the source is no text.

    Raises:
        ValueError: if `batch_size` is below 1 or `prompt` empty.

    Example:

    ```python
    >>> from transformers_minigpt4.inference.describe import describe, load_model_and_processor

    >>> model, processor = load_model_and_processor("my-checkpoint")  # doctest: +SKIP
    >>> for record in describe(["a.jpg", "b.jpg"], model, processor, do_sample=False):  # doctest: +SKIP
    ...     print(record["image"], record.get("caption", "failed"))
    ```
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; ask something, such as 'Describe this image in detail.'")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but a batch needs at least one picture; set it to 1 or more")
    return _describe(iter(sources), model, processor, prompt, batch_size, timeout, generate_kwargs)


def _describe(
    sources: Iterator[Any],
    model: Any,
    processor: Any,
    prompt: str,
    batch_size: int,
    timeout: float | None,
    generate_kwargs: dict[str, Any],
) -> Iterator[dict[str, str]]:
    numbered = enumerate(sources)
    pending: deque[tuple[str, Future[Image.Image | ImageLoadError]]] = deque()
    pool = ThreadPoolExecutor(min(batch_size, _MAX_LOADING_THREADS), thread_name_prefix="load-image")

    def load_ahead() -> None:
        for number, source in islice(numbered, batch_size):
            name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"#{number}"
            pending.append((str(name), pool.submit(_load_or_error, source, timeout)))

    try:
        load_ahead()
        while pending:
            loaded = [(name, future.result()) for name, future in pending]
            pending.clear()
            load_ahead()
            images = [image for _, image in loaded if isinstance(image, Image.Image)]
            captions = iter(caption_images(images, model, processor, prompt, **generate_kwargs) if images else ())
            for name, image in loaded:
                if isinstance(image, ImageLoadError):
                    yield {"image": name, "error": str(image)}
                else:
                    yield {"image": name, "caption": next(captions)}
    finally:
        # A consumer that stops early must not wait for downloads that nobody will read.
        pool.shutdown(wait=False, cancel_futures=True)


def _load_or_error(source: Any, timeout: float | None) -> Image.Image | ImageLoadError:
    try:
        return load_image(source, timeout=timeout)
    except ImageLoadError as error:
        return error


def caption_images(
    images: list[Image.Image], model: Any, processor: Any, prompt: str = DEFAULT_PROMPT, **generate_kwargs: Any
) -> list[str]:
    """
    Answer one prompt about each image, all in one batch.

    Args:
        images (`list[PIL.Image.Image]`): RGB images of any sizes.
        model (`PreTrainedModel`), processor (`ProcessorMixin`): of any image-text-to-text family.
        prompt (`str`, *optional*): one user turn; a processor without chat template gets the bare text.
        generate_kwargs: passed on to `model.generate`.

    Returns:
        `list[str]`: one answer an image, without prompt, special tokens and outer white space.

    Raises:
        ValueError: if `generate_kwargs` ask for several answers an image.
    """
    return answer_prompts([[image] for image in images], [prompt] * len(images), model, processor, **generate_kwargs)


def answer_prompts(
    images: list[list[Image.Image]], prompts: list[str], model: Any, processor: Any, **generate_kwargs: Any
) -> list[str]:
    """
    Answer prompts of one user turn each, all in one batch.

    Args:
        images (`list[list[PIL.Image.Image]]`): the pictures of each prompt, equally many for all; they stand in front
            of its text. None at all for prompts of text alone.
        prompts (`list[str]`): without image placeholder; a processor without chat template gets the bare text.
        model (`PreTrainedModel`), processor (`ProcessorMixin`): of any image-text-to-text family.
        generate_kwargs: passed on to `model.generate`.

    Returns:
        `list[str]`: one answer a prompt, without prompt, special tokens and outer white space.

    Raises:
        ValueError: if the model cannot take so many pictures a prompt, or `generate_kwargs` ask for several answers.
    """
    inputs = _inputs(images, prompts, processor)
    inputs = inputs.to(model.device, dtype=model.dtype)
    if getattr(model.generation_config, "max_new_tokens", None) is None:
        generate_kwargs = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **generate_kwargs}
    sequences = model.generate(**inputs, **generate_kwargs)
    if len(sequences) != len(prompts):
        raise ValueError(
            f"the generation settings gave {len(sequences)} answers for {len(prompts)} prompts, but a record holds "
            "one; leave num_return_sequences at 1"
        )
    prompt_ids = inputs["input_ids"]
    # Decoder-only models repeat the prompt in front of the answer, encoder-decoder models do not.
    if torch.equal(sequences[:, : prompt_ids.shape[1]], prompt_ids.to(sequences.device)):
        sequences = sequences[:, prompt_ids.shape[1] :]
    return _decode(processor, sequences)


def _inputs(images: list[list[Image.Image]], prompts: list[str], processor: Any) -> Any:
    tokenizer = getattr(processor, "tokenizer", processor)
    side = tokenizer.padding_side
    # Prompts of unequal length: a decoder's answers start at the right end. As an argument of the call it would turn
    # InstructBLIP's second tokenizer too, whose network counts positions from the left.
    tokenizer.padding_side = "left"
    try:
        if getattr(processor, "chat_template", None):
            return processor.apply_chat_template(
                [_conversation(pictures, prompt) for pictures, prompt in zip(images, prompts)],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        for row in images:
            if len(row) != 1:
                raise ValueError(
                    f"{type(processor).__name__} has no chat template and takes one picture a prompt, but a prompt "
                    f"has {len(row)}; use a checkpoint with a chat template"
                )
        pictures = [picture for row in images for picture in row]
        return processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    finally:
        tokenizer.padding_side = side


def _conversation(pictures: list[Image.Image], prompt: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]


def _decode(processor: Any, sequences: Any) -> list[str]:
    return [text.strip() for text in processor.post_process_image_text_to_text(sequences)]


class CaptionStreamer(BaseStreamer):
    """
    Writes one growing answer word by word; give it to [`describe`] as `streamer` with `batch_size=1`.

    transformers' `TextStreamer` decodes with the tokenizer alone and so would show the stop mark, which is ordinary
    text for a model that ends its answers with `###`. The last word waits here until it cannot be part of the mark.

    Args:
        processor (`ProcessorMixin`): decodes the answer.
        write (`Callable[[str], object]`): receives the pieces, whose concatenation is the caption.
    """

    def __init__(self, processor: Any, write: Callable[[str], object]):
        self.processor, self.write = processor, write
        self.tokens: list[int] = []
        self.written = 0
        self.prompt_passed = False

    def put(self, value: torch.Tensor) -> None:
        # The first call brings the prompt, as in every streamer of transformers.
        if not self.prompt_passed:
            self.prompt_passed = True
            return
        self.tokens += value.reshape(-1).tolist()
        text = self._text()
        self._write_until(text, len(text) if _UNSPACED_SCRIPT.match(text[-1:]) else text.rfind(" ") + 1)

    def end(self) -> None:
        text = self._text()
        self._write_until(text, len(text))

    def _text(self) -> str:
        return _decode(self.processor, torch.tensor([self.tokens]))[0] if self.tokens else ""

    def _write_until(self, text: str, stop: int) -> None:
        if stop > self.written:
            self.write(text[self.written : stop])
            self.written = stop


class CaptionFile:
    """
    An append-only JSON Lines file of captions that a later run goes on with.

    Each line is whole by itself, `{"image": ..., "caption": ..., "prompt": ..., "model": ...}`, and reaches the disk
    as soon as it is known. Pictures that failed are not written, so that the next run tries them again.

    Args:
        path (`str` or `os.PathLike`): the file; it is made if it does not exist.
        prompt (`str`): this run's prompt.
        model (`str`): this run's model.

    Raises:
        ValueError: on entry, if the file holds captions of another model or prompt, or anything but captions.
        OSError: on entry, if the file cannot be opened for reading and writing.
    """

    def __init__(self, path: str | os.PathLike, prompt: str, model: str):
        self.path, self.prompt, self.model = Path(path), prompt, model
        self.done: set[str] = set()
        self._file: BinaryIO | None = None

    def __enter__(self) -> "CaptionFile":
        if not self.path.parent.is_dir():
            raise ValueError(f"cannot write {str(self.path)!r}: there is no folder {str(self.path.parent)!r}; make it")
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"cannot write {str(self.path)!r}: it is not a regular file; choose another --output")
        self.path.touch()
        self._file = open(self.path, "r+b")
        try:
            self._read_back(self._file)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, record: dict[str, str]) -> None:
        """Write one record of [`describe`] that has a caption, and flush it."""
        if self._file is None:
            raise ValueError(f"{str(self.path)!r} is not open; use CaptionFile in a with statement")
        line = {**record, "prompt": self.prompt, "model": self.model}
        self._file.write(to_json(line).encode() + b"\n")
        self._file.flush()
        self.done.add(record["image"])

    def _read_back(self, file: BinaryIO) -> None:
        """Note the finished pictures, drop a line that a kill cut in half, and stand at the end."""
        end = 0
        for number, line in enumerate(file, start=1):
            record = self._parse(line)
            if record is None and not line.endswith(b"\n") and _is_cut_record(line):
                file.truncate(end)
                break
            if record is None:
                raise ValueError(
                    f"line {number} of {str(self.path)!r} is not a caption record; choose another --output"
                )
            for key, mine in (("model", self.model), ("prompt", self.prompt)):
                if record[key] != mine:
                    raise ValueError(
                        f"{str(self.path)!r} was made with {key} {record[key]!r}, but this run has {key} {mine!r}; "
                        "use the same or choose another --output"
                    )
            self.done.add(record["image"])
            end += len(line)
            if not line.endswith(b"\n"):
                file.seek(end)
                file.write(b"\n")
                end += 1
        file.seek(end)

    @staticmethod
    def _parse(line: bytes) -> dict[str, str] | None:
        try:
            record = json.loads(line)
        except ValueError:
            return None
        keys = ("image", "caption", "prompt", "model")
        whole = isinstance(record, dict) and all(isinstance(record.get(key), str) for key in keys)
        return record if whole else None


def _is_cut_record(line: bytes) -> bool:
    """Whether `line` can be the beginning of a record, so that dropping it cannot destroy somebody else's text."""
    start = b'{"image": "'
    return line.startswith(start) or start.startswith(line)


def to_json(record: Mapping[str, Any]) -> str:
    """One line of JSON: readable UTF-8, or ASCII escapes where a file name is no valid Unicode."""
    text = json.dumps(record, ensure_ascii=False)
    return text if text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text) else json.dumps(record)
