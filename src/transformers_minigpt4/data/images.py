"""Images as rows hold them: the bytes of a file, and a key for what an image shows."""

import hashlib
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from .schema import DataError


def image_key(image: Any) -> bytes:
    """
    Digest of a picture's content, 32 bytes.

    Args:
        image: `{"bytes", "path"}`, whose file content counts, or a PIL image, whose mode, size and pixels count. One
            picture has two keys, therefore: build the cache from rows as training reads them.
    """
    if isinstance(image, dict):
        return hashlib.sha256(image_bytes(image)).digest()
    if isinstance(image, Image.Image):
        orientation = image.getexif().get(0x0112)  # EXIF says how to turn it
        head = f"{image.mode} {image.size} {orientation} {image.getpalette()}".encode()
        return hashlib.sha256(head + image.tobytes()).digest()
    raise DataError(f"a picture is a PIL image or {{'bytes', 'path'}}, not {type(image).__name__}")


def image_bytes(image: dict[str, Any]) -> bytes:
    """
    Content of a picture's file.

    Args:
        image (`dict`): `{"bytes", "path"}` with one of the two set; the path may be remote.
    """
    content, path = image.get("bytes"), str(image.get("path"))
    if content is not None:
        return content
    if "://" in path:  # image folders of the Hub
        with fsspec.open(path, "rb") as file:
            return file.read()
    return Path(path).read_bytes()
