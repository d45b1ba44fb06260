"""Images that people send to the web page: checked, kept for as long as their conversation, and shown small."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from transformers_minigpt4.inference.sources import IMAGE_SUFFIXES
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image, open_image
from transformers_minigpt4.web.html import is_hidden


_THUMBNAIL = 512  # pixels of the longer side
_SHOWN = 60  # characters of a file's name


@dataclass(frozen=True)
class Limits:
    """
    What one person may ask for.

    Args:
        images (`int`): of one message.
        pixels (`int`): of one image. A file of some kilobytes can unpack to gigabytes.
        all_pixels (`int`): of all images of a conversation.
        characters (`int`): of one message.
        new_tokens (`int`): of one answer.
    """

    images: int = 10
    pixels: int = 50_000_000
    all_pixels: int = 150_000_000
    characters: int = 10_000
    new_tokens: int = 2_000


def check_pixels(paths: Sequence[Path], limits: Limits, before: int = 0) -> None:
    """
    Reads the sizes that image files announce, before any is unpacked.

    Args:
        paths (`Sequence[Path]`): the files.
        limits (`Limits`): what is allowed.
        before (`int`, *optional*, defaults to 0): pixels that the conversation has already.

    Raises:
        ValueError: for a file that is no image, or more pixels than the limits allow.
    """
    total = before
    for path in paths:
        try:
            with open_image(path) as image:
                pixels = image.width * image.height
        except Exception:  # of every kind, for hostile bytes
            load(path)  # says why
            continue
        total += pixels
        if pixels > limits.pixels:
            most = limits.pixels // 1_000_000
            raise ValueError(f"{shown_name(path)} has {pixels:,} pixels, but {most} million is the most; shrink it")
    if total > limits.all_pixels:
        raise ValueError(
            f"the images of this conversation have {total:,} pixels together, but {limits.all_pixels // 1_000_000} "
            "million is the most; shrink them, or start over"
        )


def load(path: Path) -> Image.Image:
    """
    An RGB image.

    Raises:
        ValueError: with the name of the file, but not its folder.
    """
    try:
        return load_image(path)
    except ImageLoadError as error:
        raise ValueError(f"{shown_name(path)} cannot be used: {error.reason}; {error.advice}") from error


def keep(path: Path, folder: Path, number: int) -> Path:
    """Gives a file a second name in a folder, so that it lasts as long as that one, and returns it."""
    suffix = path.suffix.lower()
    kept = folder / f"{number}{suffix if suffix in IMAGE_SUFFIXES else ''}"
    try:
        os.link(path, kept)
    except OSError:  # a file system without links
        shutil.copyfile(path, kept)
    return kept


def thumbnail(image: Image.Image, kept: Path) -> Path:
    """Writes a small JPEG next to a kept file, and returns it."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    path = thumbnail_of(kept)
    small.save(path, "JPEG", quality=85)
    return path


def thumbnail_of(kept: Path) -> Path:
    """Where the small JPEG of a kept file is."""
    return kept.with_name(f"{kept.stem}-small.jpg")


def shown_name(path: Path) -> str:
    """A file's name for a message: short, and without control characters."""
    name = "".join(character for character in path.name if not is_hidden(character))
    return repr(name if len(name) <= _SHOWN else f"{name[: _SHOWN // 2]}…{name[-_SHOWN // 3 :]}")
