"""Images as rows hold them: the bytes of a file, and a key for what an image shows."""

import errno
import hashlib
import os
from pathlib import Path
from typing import cast

import fsspec
from PIL import Image

from .schema import DataError, UndecodedImage


def image_key(image: object) -> bytes:
    """
    Digest of an image's content, 32 bytes.

    Args:
        image: `{"bytes", "path"}`, whose file content counts, or a PIL image, whose mode, size and pixels count. The
            same image therefore has two keys: build the cache from rows as training reads them.
    """
    if isinstance(image, dict):
        return hashlib.sha256(image_bytes(cast(UndecodedImage, image))).digest()
    if isinstance(image, Image.Image):
        orientation = image.getexif().get(0x0112)  # EXIF says how to rotate it
        head = f"{image.mode} {image.size} {orientation} {image.getpalette()}".encode()
        return hashlib.sha256(head + image.tobytes()).digest()
    raise DataError(f"an image is a PIL image or {{'bytes', 'path'}}, not {type(image).__name__}")


def image_bytes(image: UndecodedImage) -> bytes:
    """
    Content of an image's file.

    Args:
        image (`dict`): `{"bytes", "path"}` with one of the two set; the path may be remote.

    Raises:
        OSError: if the file cannot be read, or is a pipe, a socket or a device.
    """
    content, path = image.get("bytes"), str(image.get("path"))
    if content is not None:
        return content
    if "://" in path:  # image folders of the Hub
        with fsspec.open(path, "rb") as file:
            return file.read()
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe that nobody writes to would never end
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return Path(path).read_bytes()
