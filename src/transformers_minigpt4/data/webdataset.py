"""Reads webdataset shards as `img2dataset` writes them, local or remote, and notices shards that are cut short."""

import glob
import itertools
import math
import os
import re
import tarfile
import zlib
from collections.abc import Iterator

import fsspec

from transformers_minigpt4.processing.image_utils_minigpt4 import MAX_DOWNLOAD_BYTES
from transformers_minigpt4.utils.json_files import MAX_RECORD_BYTES, parse_json

from .readers import BadRow, Entry, caption_row, shuffled
from .schema import DataError, UndecodedImage


_IMAGES = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"}
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BRACES = re.compile(r"\{([^{}]*)\}")
# 5.8 billion pairs, as LAION-5B has, in img2dataset's shards of 10,000 are 580,000.
MAX_SHARDS = 1_000_000


class _StrictTarInfo(tarfile.TarInfo):
    """Raises where Python's tarfile takes a damaged or missing block in the middle for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the proper end of the archive
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"the archive ends without its end-of-archive block ({error})") from error


class WebdatasetReader:
    """
    Reads tar files of `<key>.jpg` (or another image format) and `<key>.json` with a field `caption`.

    Where the JSON has no caption, `<key>.txt` gives it.

    Args:
        name: What messages call the source.
        pattern: A tar file, a folder of them, a glob with braces such as `/data/{00000..00099}.tar`, a URL that fsspec
            opens (`hf://datasets/…`, `https://…`, `s3://…`), also with a glob, or the name of a dataset on the Hub.

    Raises:
        DataError: when there is no shard.
    """

    def __init__(self, name: str, pattern: str) -> None:
        self.shards = find_shards(pattern)
        if not self.shards:
            raise DataError(
                f"{name}: no shards found; give a tar file, a folder of them or a pattern that matches some"
            )

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    @property
    def length(self) -> None:
        return None

    def read(self, shard: int, seed: list[int] | None) -> Iterator[Entry]:
        return shuffled(self._read(self.shards[shard]), seed)

    def _read(self, url: str) -> Iterator[Entry]:
        name = url.rsplit("/", 1)[-1]
        read = 0
        if os.path.exists(url) and not os.path.isfile(url):
            yield BadRow("shard", url, "it is not a regular file")
            return
        try:
            for key, files in _samples(url):
                yield _entry(f"{name}/{key}", files)
                read += 1
        except (OSError, tarfile.TarError, EOFError, zlib.error, ValueError) as error:
            yield BadRow("shard", url, f"{type(error).__name__} after {read} rows: {error}")

    def fingerprint(self) -> str:
        sizes = (os.path.getsize(path) if os.path.isfile(path) else None for path in self.shards)
        return repr(list(zip(self.shards, sizes)))


def _samples(url: str) -> Iterator[tuple[str, dict[str, bytes | str]]]:
    """
    (key, {extension: content}) of the samples of a shard, whose files are adjacent.

    Content that cannot be used is a `str`, which says why.
    """
    key, files = "", dict[str, bytes | str]()
    with (
        fsspec.open(url, "rb") as stream,
        tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as archive,
    ):
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            folder, base = os.path.split(member.name)
            stem, dot, extension = base.partition(".")
            if not member.isfile() or not stem or not dot:
                continue
            this = os.path.join(folder, stem)
            if this != key and files:
                yield key, files
                files = {}
            key, extension = this, extension.lower()
            files[extension] = _content(archive, member, extension in files)
    if files:
        yield key, files


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, recurs: bool) -> bytes | str:
    if recurs:
        return "a file of this name occurs twice in the shard"
    # A compressed archive can announce, and contain, more than the memory holds.
    if member.size > MAX_DOWNLOAD_BYTES:
        return f"a file of it has {member.size:,} bytes, more than {MAX_DOWNLOAD_BYTES:,}"
    content = archive.extractfile(member)
    return "a file of it has no content" if content is None else content.read()


def _entry(key: str, files: dict[str, bytes | str]) -> Entry:
    key = key.encode("utf-8", "backslashreplace").decode()  # names in an archive need not be UTF-8
    images = [extension for extension in files if extension in _IMAGES]
    for content in files.values():
        if isinstance(content, str):
            return BadRow("entry", key, content)
    if len(images) != 1:
        return BadRow("image", key, f"{len(images)} images among {', '.join(sorted(files))}")
    found = {extension: content for extension, content in files.items() if isinstance(content, bytes)}
    image: list[UndecodedImage] = [{"bytes": found[images[0]], "path": None}]
    try:
        caption = _caption(found.get("json", b""), found.get("txt", b""))
    except ValueError as error:
        return BadRow("entry", key, f"the text cannot be read: {error}", image)
    return caption_row(key, image, caption)


def _caption(metadata: bytes, text: bytes) -> object:
    """
    Raises:
        ValueError: for metadata that are not JSON, and text that is not UTF-8.
    """
    if max(len(metadata), len(text)) > MAX_RECORD_BYTES:
        raise ValueError(f"it has more than {MAX_RECORD_BYTES:,} bytes")
    if metadata:
        record = parse_json(metadata)
        if not isinstance(record, dict):
            raise ValueError("the JSON is not an object")
        if record.get("caption") is not None:
            return record["caption"]
    return text.decode() if text else None


def find_shards(pattern: str) -> list[str]:
    """
    The tar files that a pattern names, sorted.

    A plain name in a range of braces need not exist: the run counts missing shards. Of a dataset on the Hub that is
    named without a pattern, the shards with `train` in their names are taken if there are any.
    """
    if not REMOTE.match(pattern) and not os.path.exists(pattern) and HUB_ID.fullmatch(pattern):
        try:
            shards = _expand_remote(f"hf://datasets/{pattern}/**/*.tar")
        except (OSError, ValueError) as error:
            raise DataError(
                f"there is no {pattern!r} on this computer, and the Hub cannot list a dataset of that name: {error}"
            ) from error
        return [shard for shard in shards if "train" in shard.rsplit("/", 1)[-1]] or shards
    found: list[str] = []
    for one in expand_braces(pattern):
        if REMOTE.match(one):
            found += _expand_remote(one)
        elif os.path.isdir(one):
            found += [path for end in TAR_SUFFIXES for path in glob.glob(os.path.join(glob.escape(one), f"*{end}"))]
        elif glob.has_magic(one) and not os.path.exists(one):
            found += glob.glob(one, recursive=True)
        else:
            found.append(one)
    if not any(REMOTE.match(path) or os.path.isfile(path) for path in found):
        return []
    return sorted(set(found))


def _expand_remote(url: str) -> list[str]:
    if not glob.has_magic(url):
        return [url]
    filesystem, path = fsspec.core.url_to_fs(url)
    return sorted(filesystem.unstrip_protocol(found) for found in filesystem.glob(path))


def expand_braces(pattern: str) -> list[str]:
    """
    `a{1..3}b` and `a{x,y}b` as the names that they expand to; a range keeps the width of its first number.

    Raises:
        DataError: for a range that is reversed, and for more than `MAX_SHARDS` names.
    """
    choices: list[list[str] | range] = []
    widths: list[int] = []
    for number, piece in enumerate(_BRACES.split(pattern)):
        if number % 2 and (match := re.fullmatch(r"(\d{1,4000})\.\.(\d{1,4000})", piece)):
            choices.append(range(int(match[1]), int(match[2]) + 1))
            widths.append(len(match[1]))
            if not choices[-1]:
                raise DataError(f"the range {{{piece}}} is reversed in {pattern!r}")
        else:
            choices.append(piece.split(",") if number % 2 else [piece])
            widths.append(0)
    count = math.prod(chosen.stop - chosen.start if isinstance(chosen, range) else len(chosen) for chosen in choices)
    if count > MAX_SHARDS:
        raise DataError(
            f"the braces in {pattern!r} stand for {count:,} shards, more than the limit of {MAX_SHARDS:,}; write the "
            "range of the shards that exist"
        )
    texts = [
        [f"{value:0{width}}" for value in chosen] if isinstance(chosen, range) else chosen
        for chosen, width in zip(choices, widths)
    ]
    return ["".join(chosen) for chosen in itertools.product(*texts)]
