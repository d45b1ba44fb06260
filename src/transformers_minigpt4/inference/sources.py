"""Lists the images that command-line arguments name: files, folders, URLs and a list on standard input."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, TextIO, TypeAlias

from PIL import Image


# What `processing.image_utils_minigpt4.load_image` takes.
ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | Image.Image"
# What counts as an image inside a folder. HEIC is included although plain PIL cannot read it: such a file is then
# reported as failed, where leaving it out would silently lose a phone's photos.
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".jp2", ".ppm", ".pgm", ".pbm", ".tga", ".ico"),
    )
)
_URL = re.compile(r"(https?|data):", re.IGNORECASE)


def expand_sources(arguments: Iterable[str], stdin: TextIO | None = None) -> list[str]:
    """
    List the images that command-line arguments name, each once, in order.

    Args:
        arguments (`Iterable[str]`): files, URLs, folders (searched recursively for [`IMAGE_SUFFIXES`], sorted, without
            hidden files) and `-` for a list of the same on `stdin`, one per line.
        stdin (`TextIO`, *optional*): where `-` is read from.

    Returns:
        `list[str]`: URLs as given and paths in normal form; a file that does not exist is listed as well.

    Raises:
        ValueError: if a folder holds no image, or `-` is given without `stdin`.
        OSError: if a folder cannot be read.
    """
    found: list[str] = []
    for argument in arguments:
        if argument == "-":
            if stdin is None:
                raise ValueError("'-' reads a list of images from standard input, but there is no standard input")
            lines = (line.rstrip("\r\n") for line in stdin)
            found.extend(expand_sources(line for line in lines if line.strip() and line != "-"))
        elif is_url(argument):
            found.append(argument)
        elif os.path.isdir(argument):
            images = _images_in(Path(argument))
            if not images:
                raise ValueError(f"{argument!r} holds no image; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
            found.extend(images)
        else:
            found.append(str(Path(argument)))
    return list(dict.fromkeys(found))


def is_url(source: str) -> bool:
    """Whether an image is downloaded, or is a `data:` URL."""
    return _URL.match(source) is not None


def _images_in(folder: Path) -> list[str]:
    def stop(error: OSError) -> None:
        # os.walk skips folders that it cannot read unless told otherwise.
        raise error

    images: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += (
            Path(parent, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        )
    return [str(path) for path in sorted(images)]
