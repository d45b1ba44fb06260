"""Turns a path, URL, bytes, open file or PIL image into an upright RGB image, or into one error that says why not."""

import base64
import binascii
import errno
import functools
import io
import os
import re
import urllib.parse
from typing import Any, BinaryIO

import numpy as np
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps, UnidentifiedImageError

from .deadline_minigpt4 import run_within


# PIL reads more: EPS, for which it starts Ghostscript, and formats of programs and instruments. What a file is called
# does not matter to PIL, so the list is the only thing that keeps an EPS named `.jpg` from running its program.
IMAGE_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"),
    *("AVIF", "HEIF", "JPEG2000", "PPM", "TGA", "ICO"),  # HEIF where a plugin of PIL is installed and registered
)
# Far above any photograph, far below what fills the memory of a machine that loads several at once.
MAX_DOWNLOAD_BYTES = 100 * 1024 * 1024
# Seconds for a complete download.
DEFAULT_TIMEOUT = 30.0

_NOT_REGULAR = "it is not a regular file, but a directory, pipe, socket or device"
_ORIENTATION_TAG = 0x0112
_MAX_REDIRECTS = 5
_MAX_NAME_LENGTH = 200
# Web servers that serve images often refuse clients that do not name themselves.
_HEADERS = {"User-Agent": "transformers-minigpt4", "Accept": "image/*,*/*;q=0.5"}
# The shortest string worth trying as base64: no image format fits a file into fewer bytes.
_BASE64_IMAGE = re.compile(r"[A-Za-z0-9+/\s]{32,}={0,2}\s*")
_WEB_URL = re.compile(r"https?://", re.IGNORECASE)
_URL_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


class ImageLoadError(ValueError):
    """An image that cannot be loaded; the one-line message says what was given, why it fails and what to do."""

    def __init__(self, name: str, reason: str, advice: str):
        self.name, self.reason, self.advice = name, reason, advice
        super().__init__(f"cannot load image {name}: {reason}; {advice}")

    def __reduce__(self) -> tuple[object, ...]:
        # The default passes only the message on, and worker processes hand exceptions over by pickling them.
        return type(self), (self.name, self.reason, self.advice)


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Convert a PIL image to 8-bit RGB as a viewer would show it, turned upright by its EXIF orientation.

    Transparency is dropped, not blended, as the authors' `convert("RGB")` does. Single-channel images of more than
    8 bits are scaled to 0..255, where PIL alone would clip them to white. Of an animation the current frame is taken,
    which is the first in a file just opened.

    Args:
        image (`PIL.Image.Image`): image of any mode.

    Returns:
        `PIL.Image.Image`: RGB image; the very object given if it is RGB and upright already.

    Raises:
        ImageLoadError: if PIL knows no way from the image's mode to RGB.
    """
    if image.getexif().get(_ORIENTATION_TAG, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scale_to_8_bits(image)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageLoadError(
            _name_of(image), f"its mode {image.mode!r} has no conversion to RGB ({error})", "convert it to RGB first"
        ) from error


def open_image(file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """
    `PIL.Image.open` for the formats of `IMAGE_FORMATS` only, and for regular files only.

    Every image file of this package is opened here. Use the result in a `with` statement; pixels are not read yet.

    Args:
        file (`str`, `os.PathLike` or binary file): path, or a file opened in binary mode.

    Raises:
        OSError: if the file cannot be read, is a pipe, a socket or a device, which may never end, or is no image of
            these formats (`PIL.UnidentifiedImageError`).
    """
    if isinstance(file, (str, os.PathLike)) and os.path.exists(file) and not os.path.isfile(file):
        raise OSError(errno.EINVAL, _NOT_REGULAR, os.fspath(file))
    Image.init()  # `Image.open` takes no format whose plugin it has not loaded
    return Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])


def load_image(
    source: object, timeout: float | None = DEFAULT_TIMEOUT, client: httpx.AsyncClient | None = None
) -> Image.Image:
    """
    Load one image, decode it fully and convert it with [`to_rgb`].

    Unlike `transformers.image_utils.load_image` it bounds time and size of downloads, reads HTTP error pages as
    errors, takes open files and bytes, scales 16-bit images and raises one kind of error for whatever goes wrong.

    Args:
        source (`str`, `os.PathLike`, `bytes`, binary file or `PIL.Image.Image`):
            a path, an `http://`, `https://` or `data:` URL, a base64 string, the bytes of an image file, a file
            opened in binary mode, or an image.
        timeout (`float`, *optional*, defaults to 30): seconds that a download may take; `None` waits forever.
        client (`httpx.AsyncClient`, *optional*): what downloads, in the event loop of all downloads; for programs that
            do not fetch every address.

    Returns:
        `PIL.Image.Image`: upright RGB image held in memory, no file left open.

    Raises:
        ImageLoadError: if the image cannot be read completely: missing, unreadable, empty, truncated, not an image,
            more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, HTTP error, time-out or more than `MAX_DOWNLOAD_BYTES`.
    """
    name = _name_of(source)
    if isinstance(source, Image.Image):
        return _decode(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(source), name)
    if hasattr(source, "read"):
        return _open(io.BytesIO(_read_stream(source, name)), name)
    if isinstance(source, str):
        if _WEB_URL.match(source):
            content, content_type = _download(source, name, timeout, client)
            return _open(io.BytesIO(content), name, served_as=content_type)
        if source[:5].lower() == "data:":
            return _open(io.BytesIO(_read_data_url(source, name)), name)
        if match := _URL_SCHEME.match(source):
            raise ImageLoadError(
                name, f"{match[1]}:// is not supported", "give a path or an http://, https:// or data: URL"
            )
        if _BASE64_IMAGE.fullmatch(source) and not os.path.exists(source):
            return _open_base64(source, name)
    if isinstance(source, (str, os.PathLike)):
        return _open_path(source, name)
    raise ImageLoadError(
        name, f"{type(source).__name__} is not an image source", "give a path, URL, bytes, binary file or PIL image"
    )


def download_image(url: str, timeout: float | None = DEFAULT_TIMEOUT) -> bytes:
    """
    The content of an image's URL, not decoded.

    Args:
        url (`str`): An `http://`, `https://` or `data:` URL.
        timeout (`float`, *optional*, defaults to 30): seconds that the download may take; `None` waits forever.

    Raises:
        ImageLoadError: for an HTTP error, a time-out or more than `MAX_DOWNLOAD_BYTES`.
    """
    name = _name_of(url)
    if url[:5].lower() == "data:":
        return _read_data_url(url, name)
    return _download(url, name, timeout, None)[0]


def _name_of(source: object) -> str:
    """What an error message calls the source: short, on one line, and without a URL's password."""
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"<{source.mode} image of {source.width}x{source.height} pixels>"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if hasattr(source, "read"):
        return str(getattr(source, "name", f"<{type(source).__name__}>"))
    if not isinstance(source, (str, os.PathLike)):
        return f"<{type(source).__name__}>"
    name = os.fsdecode(source)
    if _WEB_URL.match(name):
        name = re.sub(r"//[^/?#]*@", "//", name, count=1)
    return repr(name if len(name) <= _MAX_NAME_LENGTH else f"{name[:40]}... ({len(name)} characters)")


def _open_path(path: str | os.PathLike[str], name: str) -> Image.Image:
    if os.path.isdir(path):
        raise ImageLoadError(name, "it is a directory", "give the files inside")
    try:
        # Opening a pipe that nobody writes to would never return.
        if os.path.exists(path) and not os.path.isfile(path):
            raise ImageLoadError(name, "it is a pipe, a socket or a device", "copy the image to a regular file")
        with open(path, "rb") as file:
            return _open(file, name)
    except ImageLoadError:
        raise
    except FileNotFoundError as error:
        raise ImageLoadError(name, "there is no such file", "check the path") from error
    except PermissionError as error:
        raise ImageLoadError(name, "permission denied", "make the file readable") from error
    except (OSError, ValueError) as error:
        raise ImageLoadError(name, f"it cannot be read ({_reason(error)})", "check the path and the disk") from error


def _read_stream(stream: Any, name: str) -> bytes:
    try:
        content = stream.read()
    except (OSError, ValueError) as error:
        raise ImageLoadError(name, f"it cannot be read ({_reason(error)})", "give an open, readable file") from error
    if not isinstance(content, bytes):
        raise ImageLoadError(name, f"it yields {type(content).__name__}, not bytes", "open it in binary mode ('rb')")
    return content


def _read_data_url(url: str, name: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageLoadError(name, "it is a data: URL without a comma", "give data:image/png;base64,<data>")
    try:
        if header.endswith(";base64"):
            return base64.b64decode(urllib.parse.unquote(payload), validate=True)
        return urllib.parse.unquote_to_bytes(payload)
    except (binascii.Error, ValueError) as error:
        raise ImageLoadError(name, f"its base64 data is broken ({error})", "encode the file again") from error


def _open_base64(text: str, name: str) -> Image.Image:
    try:
        return _open(io.BytesIO(base64.b64decode("".join(text.split()), validate=True)), name)
    except (binascii.Error, ImageLoadError) as error:
        reason = error.reason if isinstance(error, ImageLoadError) else str(error)
        raise ImageLoadError(
            name, f"there is no such file, and read as base64 {reason}", "check the path or the base64 data"
        ) from error


@functools.lru_cache(maxsize=1)
def _http_client(process_id: int) -> httpx.AsyncClient:
    # Kept, because making one loads the certificate store each time; it is used in the one event loop of the process.
    # One per process, because a forked data worker must not read answers from its parent's connections.
    return new_http_client()


def new_http_client(transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """A client as [`load_image`] uses one; each redirect, too, goes through `transport`."""
    return httpx.AsyncClient(
        follow_redirects=True, max_redirects=_MAX_REDIRECTS, headers=_HEADERS, transport=transport
    )


def _download(url: str, name: str, timeout: float | None, client: httpx.AsyncClient | None) -> tuple[bytes, str]:
    """Fetch `url` within the limits; returns the body and its content type."""
    try:
        return run_within(timeout, _fetch(url, name, timeout, client))
    except (httpx.TimeoutException, TimeoutError) as error:
        raise ImageLoadError(
            name, f"the server took longer than {timeout} seconds", "try again, raise the timeout or download it first"
        ) from error
    except httpx.UnsupportedProtocol as error:
        raise ImageLoadError(name, "it leads to an address that is not http or https", "check the URL") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageLoadError(name, f"the download failed ({_reason(error)})", "check the URL and network") from error


async def _fetch(url: str, name: str, timeout: float | None, client: httpx.AsyncClient | None) -> tuple[bytes, str]:
    content = bytearray()
    client = client or _http_client(os.getpid())
    async with client.stream("GET", url, timeout=timeout) as response:
        if not response.is_success:
            raise ImageLoadError(
                name, f"the server answered {response.status_code} {response.reason_phrase}", "check the URL"
            )
        # The header spares a download that must fail; without or against it the count below decides.
        announced = response.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > MAX_DOWNLOAD_BYTES:
            raise _too_large(name)
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > MAX_DOWNLOAD_BYTES:
                raise _too_large(name)
        return bytes(content), response.headers.get("content-type", "")


def _too_large(name: str) -> ImageLoadError:
    return ImageLoadError(
        name, f"it is larger than {MAX_DOWNLOAD_BYTES // 2**20} MiB", "download it and make it smaller first"
    )


def _open(file: BinaryIO, name: str, served_as: str = "") -> Image.Image:
    """Decode a seekable binary file; `served_as` is the content type that a web server gave it."""
    try:
        if not file.read(1):
            raise ImageLoadError(name, "it is empty", "copy or download it again")
        file.seek(0)
        with open_image(file) as image:
            # PIL only warns up to twice its limit, and nobody sees a warning in a batch job that runs out of memory.
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            return _decode(image, name)
    except UnidentifiedImageError as error:
        served = f" (served as {served_as})" if served_as and not served_as.startswith("image/") else ""
        raise ImageLoadError(
            name,
            f"it is not an image in one of the formats {', '.join(IMAGE_FORMATS)}{served}",
            "convert it to JPEG, PNG or WebP",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageLoadError(
            name,
            f"it has more than {Image.MAX_IMAGE_PIXELS} pixels, PIL's limit against decompression bombs",
            "make it smaller first",
        ) from error
    except ImageLoadError:
        raise
    except Exception as error:
        # PIL's readers meet hostile bytes with errors of every kind (SyntaxError, struct.error, IndexError, ...).
        raise ImageLoadError(
            name, f"the file is broken or cut short ({_reason(error)})", "copy or download it again"
        ) from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Bring all pixels into memory, then make them upright RGB."""
    try:
        image.load()
    except Exception as error:
        raise ImageLoadError(
            name, f"the file is broken or cut short ({_reason(error)})", "copy or download it again"
        ) from error
    return to_rgb(image)


def _reason(error: BaseException) -> str:
    """An exception's message on one line without its Python object addresses, or its type if it has none."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>", "data", text).split()) or type(error).__name__


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """
    Scale a single-channel image of 16 or 32 bits to 8 bits.

    PIL's modes `I` and `F` do not record their range, so it is inferred from the values: up to 1 for floats, 255 or
    65535; anything else is stretched from its least to its greatest value. NaN becomes black.
    """
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    else:
        ceilings = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        ceiling = next((limit for limit in ceilings if low >= 0 and high <= limit), None)
        low, high = (0.0, ceiling) if ceiling is not None else (low, high)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scale = 255.0 / (high - low) if high > low else 0.0
    return Image.fromarray(np.rint((values - low) * scale).astype(np.uint8))
