"""Samples images at random from a source and copies them into the project, each with a record of its origin."""

import hashlib
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from transformers_minigpt4.data.images import image_bytes
from transformers_minigpt4.data.readers import BadRow, Reader
from transformers_minigpt4.data.schema import UndecodedImage
from transformers_minigpt4.data.sources import KINDS, open_reader, parse_source
from transformers_minigpt4.inference.sources import IMAGE_SUFFIXES, expand_sources
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image, open_image
from transformers_minigpt4.utils.files import JsonObject, write_atomically

from .config import CONFIG_FILE, CurationConfig
from .database import file_name
from .progress import bar
from .records import IMAGES
from .settings_file import CurationError
from .store import Project


PYTHON = "python:"  # before MODULE:FUNCTION
_SHARDS = 64  # images are sampled from at least this many shards of a source that has more
_TOGETHER = 32  # images recorded in one transaction
_SLUG = re.compile(r"[^A-Za-z0-9._-]+")
# For other formats, PIL's name in lower case.
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}


@dataclass(frozen=True)
class Candidate:
    """A row of the source, read no further than needed: `content` reads the image's bytes."""

    key: str
    content: Callable[[], bytes]
    texts: dict[str, str]


@dataclass(frozen=True)
class Sampled:
    """What `sample_images` did: images in the project now, how many of them are new, rows skipped in this run."""

    total: int
    new: int
    skipped: int
    wanted: int

    def __str__(self) -> str:
        text = f"{self.total:,} images sampled, {self.new:,} of them now"
        if self.skipped:
            text += f"; {self.skipped:,} rows skipped, see `minigpt4 curate status`"
        if self.total < self.wanted:
            text += f"; the source has no more, although {self.wanted:,} were asked for"
        return text


def sample_images(project: Project, config: CurationConfig, progress: bool = True) -> Sampled:
    """
    Samples until the project has `config.images`, resuming where an earlier run stopped.

    The same source and seed give the same images. From a source with many shards, rows are taken from at least 64 of
    them, chosen at random, and within a shard through the shuffle buffer of the training's readers. An image that
    cannot be read, or whose content has been sampled already, is recorded as skipped with the reason, and another one
    is sampled.

    Raises:
        CurationError: for a project sampled from another source or seed, a source without a usable image, or a full
        disk.
        DataError: for a source that cannot be opened.
    """
    before = sum(1 for _ in project.pairs())
    identity = json.dumps([config.source, config.seed])
    sampled_from = project.meta("sampled_from")
    if before and sampled_from != identity:
        source, seed = json.loads(sampled_from or '["?", 0]')
        raise CurationError(
            f"the {before} images of {project.folder} were sampled from {source} with seed {seed}, but {CONFIG_FILE} "
            f"says {config.source} with seed {config.seed}; restore these settings, or start a new project folder"
        )
    if before >= config.images:
        return Sampled(before, 0, 0, config.images)
    project.set_meta("sampled_from", identity)
    skipped_before = len(project.skipped())
    sampling = _Sampling(project, config)
    with bar("sample", config.images, before, progress) as count:
        for candidate in candidates(config):
            count(sampling.take(candidate))
            if sampling.total == config.images:
                break
        sampling.flush()
    skipped = project.skipped()
    if not sampling.total:
        example = f", such as {skipped[0]['source_key']}: {skipped[0]['reason']}" if skipped else ""
        raise CurationError(f"{config.source} gave no usable image; {len(skipped)} rows were skipped{example}")
    return Sampled(sampling.total, sampling.total - before, len(skipped) - skipped_before, config.images)


class _Sampling:
    """Puts candidates into the project, some at a time."""

    def __init__(self, project: Project, config: CurationConfig) -> None:
        self.project, self.source = project, config.source
        pairs = list(project.pairs())
        self.known = {file_name(str(pair.origin["key"])) for pair in pairs}
        self.known |= {row["source_key"] for row in project.skipped()}
        self.digests = {pair.sha256: pair.key for pair in pairs}
        self.total = len(pairs)
        self.waiting: list[tuple[str, str, str, JsonObject]] = []

    def take(self, candidate: Candidate | BadRow) -> int:
        """How many images it added: 0 or 1."""
        if file_name(candidate.key) in self.known:
            return 0
        self.known.add(file_name(candidate.key))
        if isinstance(candidate, BadRow):
            return self._skip(candidate.key, candidate.kind, candidate.reason)
        try:
            content = candidate.content()
            load_image(content)
        except (ImageLoadError, OSError) as error:
            return self._skip(candidate.key, "image", str(error))
        digest = hashlib.sha256(content).hexdigest()
        if digest in self.digests:
            return self._skip(candidate.key, "duplicate", f"the same image as {self.digests[digest]}")
        self.total += 1
        key = _pair_key(self.total, candidate.key)
        path = Path(IMAGES) / f"{key}{_suffix(content)}"
        _write(self.project.folder / path, content)
        self.digests[digest] = key
        self.waiting.append((key, path.as_posix(), digest, {"key": candidate.key, **candidate.texts}))
        if len(self.waiting) == _TOGETHER:
            self.flush()
        return 1

    def flush(self) -> None:
        self.project.add_pairs(self.waiting, self.source)
        self.waiting = []

    def _skip(self, key: str, kind: str, reason: str) -> int:
        self.project.add_skipped(self.source, (key, kind, reason))
        return 0


def candidates(config: CurationConfig) -> Iterator[Candidate | BadRow]:
    """
    The rows of `config.source` in random order: always the same for one source, seed and number of images.

    Raises:
        CurationError: for a function that does not exist or whose rows have no `image`.
        DataError: for a source that cannot be opened.
    """
    if config.source.startswith(PYTHON):
        yield from _rows_of_function(config)
    elif Path(config.source).is_dir() and config.source.partition(":")[0] not in KINDS:
        images = expand_sources([config.source])
        random.Random(config.seed).shuffle(images)
        for name in images:
            path = Path(name)
            yield Candidate(str(path.relative_to(config.source)), path.read_bytes, {})
    else:
        yield from _rows_of_reader(open_reader(parse_source(config.source)), config)


def _rows_of_reader(reader: Reader, config: CurationConfig) -> Iterator[Candidate | BadRow]:
    order = np.random.default_rng([config.seed, 0]).permutation(reader.num_shards).tolist()
    share = -(-config.images // min(len(order), _SHARDS))
    start = 0
    while order:
        for shard in list(order):
            count = 0
            for entry in islice(reader.read(shard, [config.seed, 0, 0, shard]), start, start + share):
                count += 1
                if isinstance(entry, BadRow):
                    yield entry
                elif len(entry.images) != 1:
                    yield BadRow("image", entry.key, f"{len(entry.images)} images, but one is described")
                else:
                    texts = {"caption": entry.caption} if entry.caption is not None else {}
                    yield Candidate(entry.key, _reads(entry.images[0]), texts)
            if count < share:
                order.remove(shard)
        start += share


def _reads(image: UndecodedImage) -> Callable[[], bytes]:
    return lambda: image_bytes(image)


def _rows_of_function(config: CurationConfig) -> Iterator[Candidate | BadRow]:
    module, _, name = config.source.removeprefix(PYTHON).partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CurationError(
            f"source {config.source!r} cannot be found ({error}); write python:MODULE:FUNCTION"
        ) from error
    for number, row in enumerate(function(config.images, config.seed)):
        if not isinstance(row, dict) or not isinstance(row.get("image"), Image.Image):
            raise CurationError(f"row {number} of {config.source} is {row!r:.80}, but needs a PIL image as `image`")
        texts = {name: value for name, value in row.items() if isinstance(value, str) and name != "key"}
        yield Candidate(str(row.get("key", number)), _encodes(row["image"]), texts)


def _encodes(image: Image.Image) -> Callable[[], bytes]:
    def encode() -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()

    return encode


def _pair_key(number: int, key: str) -> str:
    """`00017-004539375`: a file name that sorts in the order of sampling and shows the source's key."""
    slug = _SLUG.sub("-", key.rpartition("/")[2]).strip("-.")
    root, suffix = os.path.splitext(slug)
    slug = (root if suffix.lower() in IMAGE_SUFFIXES else slug)[:60]
    return f"{number:05d}-{slug}" if slug else f"{number:05d}"


def _suffix(content: bytes) -> str:
    with open_image(io.BytesIO(content)) as image:
        kind = image.format or "png"
    return _SUFFIXES.get(kind, f".{kind.lower()}")


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content, sync=True)
    except OSError as error:
        raise CurationError(
            f"cannot write {path}: {error.strerror}; free some space and run the same command again"
        ) from error
