"""Opens sources of rows, named in one line each, and mixes them into one stream for training."""

import glob
import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from datasets import IterableDataset, interleave_datasets, load_dataset, load_from_disk
from PIL import Image

from transformers_minigpt4.processing.image_utils_minigpt4 import load_image

from . import annotations
from .guess import guess_kind
from .held_out import Selection
from .images import image_bytes, image_key
from .prompt_formats import PROMPT_FORMATS, PromptFormat, draw_instruction, render
from .readers import AnnotationReader, BadRow, DatasetReader, Entry, Reader
from .schema import DataError, Row, RowImage, UndecodedImage, validate_row
from .skipped_rows import SkippedRows
from .stream import RAW_FEATURES, RawColumns, SourceIterable, raw_row
from .webdataset import WebdatasetReader


logger = logging.getLogger(__name__)

# Kinds of sources that are one file or folder of annotations, and whether `images=` may say where the images are.
_ANNOTATION_READERS: dict[str, tuple[Callable[[Path, Path | None], Iterator[Entry]], bool]] = {
    "llava": (annotations.llava, True),
    "cc_sbu_align": (annotations.cc_sbu_align, False),
    "locnarr": (annotations.localized_narratives, True),
    "coco": (annotations.coco, True),
    "table": (annotations.table, True),
    "imagefolder": (annotations.imagefolder, False),
}
_TABLES = {"table": annotations.table, "imagefolder": annotations.imagefolder}  # may have images only
_OPTIONS: dict[str, set[str]] = {
    "wds": {"weight"},
    "dataset": {"weight", "split"},
    **{kind: {"weight", "images"} if images else {"weight"} for kind, (_, images) in _ANNOTATION_READERS.items()},
}
KINDS = tuple(_OPTIONS)


@dataclass(frozen=True)
class Source:
    """
    Where rows come from: `KIND:PATH`, followed by `::images=FOLDER`, `::split=NAME` and `::weight=NUMBER`.

    `guessed` says from what the kind was guessed, if only a path was given.
    """

    kind: str
    path: str
    images: str | None = None
    split: str | None = None
    weight: float | None = None
    guessed: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        options = {"images": self.images, "split": self.split, "weight": self.weight}
        return f"{self.kind}:{self.path}" + "".join(
            f"::{name}={value:g}" if isinstance(value, float) else f"::{name}={value}"
            for name, value in options.items()
            if value is not None
        )


def parse_source(text: str) -> Source:
    """
    Reads one line of a configuration, such as `wds:/data/laion/{00000..01255}.tar::weight=115`.

    Of a path without a kind, the kind is guessed, see [`guess_kind`].

    Raises:
        DataError: for an unknown kind or option, an option that the kind does not have, a missing path, a bad weight,
            and a path whose kind cannot be guessed.
    """
    first, *options = str(text).split("::")
    kind, colon, path = first.partition(":")
    guessed = None
    if kind not in KINDS or not colon:
        path = first
        kind, guessed = guess_kind(path, KINDS)
    if not path:
        raise DataError(f"{text!r} is not a source; write KIND:PATH, with KIND one of {', '.join(KINDS)}")
    values: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if name not in _OPTIONS[kind] or not equals or not value:
            raise DataError(
                f"{option!r} in {text!r} is not an option of {kind}, whose options are "
                f"{', '.join(sorted(_OPTIONS[kind]))}"
            )
        if name in values:
            raise DataError(f"{name} is given twice in {text!r}")
        values[name] = value
    weight = values.get("weight")
    if weight is not None and (not re.fullmatch(r"\d+(\.\d+)?", weight) or not 0 < float(weight) < math.inf):
        raise DataError(f"the weight in {text!r} must be a number above zero, such as 115")
    number = None if weight is None else float(weight)
    return Source(kind, path, values.get("images"), values.get("split"), number, guessed)


def open_reader(source: Source, captions: bool = True) -> Reader:
    """
    The reader of a source; annotation files are read here, shards and images later.

    Args:
        source: From [`parse_source`].
        captions: Whether the source must have captions. Rows without one are given as bad rows in any case.

    Raises:
        DataError: when there is nothing at the path, or nothing in the source's format.
    """
    name = str(source)
    if source.kind == "wds":
        return WebdatasetReader(name, source.path)
    if source.kind == "dataset":
        return DatasetReader(name, *_open_dataset(source), captions)
    path = Path(source.path)
    if not path.exists():
        raise DataError(f"{name}: there is no {source.path}")
    wants_folder = source.kind in ("cc_sbu_align", "imagefolder")
    if wants_folder != path.is_dir():
        raise DataError(
            f"{name}: {source.path} is {'not a folder' if wants_folder else 'a folder; name the file in it'}"
        )
    if source.images is not None and not Path(source.images).is_dir():
        raise DataError(f"{name}: images={source.images} is not a folder")
    if source.kind == "cc_sbu_align" and not (path / "filter_cap.json").is_file():
        raise DataError(f"{name}: {source.path} contains no filter_cap.json")
    read, _ = _ANNOTATION_READERS[source.kind]
    if not captions and source.kind in _TABLES:
        read = partial(_TABLES[source.kind], captions=False)
    return AnnotationReader(name, read(path, Path(source.images) if source.images is not None else None))


def _open_dataset(source: Source) -> tuple[IterableDataset, int | None]:
    """A dataset, and its number of rows if it is recorded."""
    split = source.split or "train"
    try:
        if os.path.isfile(os.path.join(source.path, "state.json")):  # written by save_to_disk
            saved = load_from_disk(source.path)
            return saved.to_iterable_dataset(num_shards=min(64, max(1, len(saved)))), len(saved)
        if os.path.isfile(source.path) and source.path.lower().endswith(".parquet"):
            files = glob.escape(source.path)
            stream = load_dataset("parquet", data_files={split: files}, split=split, streaming=True)
        else:
            stream = load_dataset(source.path, split=split, streaming=True)
        recorded = (stream.info.splits or {}).get(split)
        return stream, recorded.num_examples or None if recorded is not None else None
    except Exception as error:  # datasets raises a dozen kinds, all of which mean that it cannot be read
        raise DataError(f"{source}: it cannot be opened as a dataset ({type(error).__name__}: {error})") from error


class Rows(NamedTuple):
    """
    A stream of rows (`schema.validate_row`), counts of the skipped ones, a digest of where they come from, and how
    many rows an epoch of all sources has, if that is known before they are read.
    """

    dataset: IterableDataset
    skipped: SkippedRows
    fingerprint: str
    length: int | None = None


class _Renderer:
    """Turns a raw row, as a batch of one, into rows of a prompt format: one, or none where that is impossible."""

    def __init__(
        self,
        prompt_format: PromptFormat,
        seed: int,
        decode: bool,
        skipped: SkippedRows,
        features: Container[bytes] | None = None,
        selection: Selection | None = None,
    ) -> None:
        self.prompt_format, self.seed, self.decode = prompt_format, seed, decode
        self.skipped, self.features, self.selection = skipped, features, selection

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        row = self.row(cast(RawColumns, {column: values[0] for column, values in batch.items()}))
        return {} if row is None else {column: [value] for column, value in row.items()}

    def row(self, raw: RawColumns) -> Row | None:
        source, key = raw["source"], raw["key"]
        undecoded = raw["images"]
        try:
            if self.selection is not None:
                contents = [UndecodedImage(bytes=image_bytes(image), path=image["path"]) for image in undecoded]
                if not self.selection.selects(contents, str(raw["caption"] or raw["messages"])):
                    return None
                if self.decode or self.features is not None:  # nothing is read twice
                    undecoded = contents
            images = [self._image(image) for image in undecoded]
        except DataError:  # of an image without features
            raise
        except (OSError, ValueError) as error:
            self.skipped.add(source, "unreadable_image", key, str(error))
            return None
        instruction = draw_instruction(self.prompt_format, self.seed, source, raw["epoch"], key)
        try:
            row = render(self.prompt_format, images, raw["caption"], raw["messages"], instruction)
            validate_row(row)
        except DataError as error:
            self.skipped.add(source, "prompt_format", key, str(error))
            return None
        return {**row, "key": key, "source": self.skipped.sources[source]}

    def _image(self, image: UndecodedImage) -> RowImage:
        if self.features is None:
            return _load(image) if self.decode else image
        held: UndecodedImage = {"bytes": image_bytes(image), "path": image["path"]}
        if image_key(held) not in self.features:
            load_image(image_bytes(held))  # raises for a broken one, which has no features and is skipped
            raise DataError(
                f"there are no features of {image['path'] or 'an image'} ({image_key(held).hex()[:16]}…); build them "
                "from the rows that are trained on: `minigpt4 features` with the same recipe adds the missing ones"
            )
        return held


def _load(image: UndecodedImage) -> Image.Image:
    path = image["path"]
    # A Path, because as a string it might be taken for a URL or base64.
    local = image["bytes"] is None and path is not None and "://" not in path
    return load_image(Path(str(path)) if local else image_bytes(image))


def open_rows(
    sources: str | Source | Sequence[str | Source],
    prompt_format: PromptFormat,
    *,
    seed: int = 42,
    shuffle: bool = True,
    epochs: int | None = None,
    decode: bool = True,
    min_shards: int = 1,
    max_error_rate: float | None = 0.05,
    features: Container[bytes] | None = None,
    selection: Selection | None = None,
) -> Rows:
    """
    Opens one or several sources as one stream of rows.

    Args:
        sources: What [`parse_source`] reads, or its result. Several are mixed by weight, or equally without weights.
        prompt_format: One of `PROMPT_FORMATS`.
        seed: Draws the orders, the source of each row and the instructions. The same seed and sources give the same
            rows.
        shuffle: Whether each epoch has another order: of all annotations of a file, and within a buffer of a shard.
        epochs: How often each source is read. `None` never ends, which training wants: processes then cannot run out
            of rows at different steps. With a number and several sources, the stream ends when each has been read.
        decode: Whether rows hold PIL images, decoded where the row is read, or `{"bytes", "path"}`.
        min_shards: Processes times data workers, so that each has something to read. A source with fewer shards is
            then read several times in parallel, each reader keeping its piece.
        max_error_rate: Fraction of a source's rows, or shards, that may be bad; above it, reading raises.
        features: Rows then have undecoded images; of images without features, broken ones are skipped like any bad
            row, and an intact one stops reading.
        selection: Gives only some of the rows, those that are held out or those that are not; the others do not count
            as skipped.

    Returns:
        `Rows`: dataset, counts of skipped rows, fingerprint and length. The dataset is split among processes and data
        workers like any other of `datasets`, and its `state_dict` resumes at the exact row.

    Raises:
        DataError: for sources that cannot be opened, or one without a single usable row.
    """
    chosen = _chosen(sources)
    if prompt_format not in PROMPT_FORMATS:
        raise DataError(f"unknown prompt format {prompt_format!r}; choose one of {', '.join(PROMPT_FORMATS)}")
    if (epochs is not None and epochs < 1) or min_shards < 1:
        raise DataError(f"epochs and min_shards must be 1 or more, not {epochs} and {min_shards}")
    names = [str(replace(source, weight=None)) for source in chosen]
    skipped = SkippedRows(names, max_error_rate)
    iterables = []
    lengths: list[int | None] = []
    digest = hashlib.sha256(repr(names).encode())
    for number, source in enumerate(chosen):
        reader = open_reader(source)
        digest.update(reader.fingerprint().encode())
        lengths.append(reader.length)
        _check_for_a_row(reader, prompt_format, SkippedRows([names[number]], max_error_rate, log=False), selection)
        iterables.append(SourceIterable(reader, number, skipped, seed if shuffle else None, epochs, min_shards))
    mixed = _mix([iterable.dataset() for iterable in iterables], chosen, seed, epochs)
    renderer = _Renderer(prompt_format, seed, decode, skipped, features, selection)
    dataset = mixed.map(renderer, batched=True, batch_size=1, remove_columns=list(RAW_FEATURES))
    known = [length for length in lengths if length is not None]
    return Rows(dataset, skipped, digest.hexdigest(), sum(known) if len(known) == len(lengths) else None)


def render_source(
    reader: Reader,
    prompt_format: PromptFormat,
    skipped: SkippedRows,
    *,
    seed: int | None = None,
    limit: int | None = None,
    selection: Selection | None = None,
) -> Iterator[Row]:
    """
    The usable rows among the first `limit` of one epoch of a source, in the files' order without a seed.

    Instructions are those of a training run, of its seed 42 if none is given.
    """
    renderer = _Renderer(prompt_format, 42 if seed is None else seed, True, skipped, selection=selection)
    rows = 0
    for entry in SourceIterable(reader, 0, skipped, seed, epochs=1).entries():
        if skipped.accepts(entry, 0) and (row := renderer.row(raw_row(entry, 0, 0))) is not None:
            yield row
        rows += not (isinstance(entry, BadRow) and entry.kind == "shard")
        if rows == limit:
            return


def _chosen(sources: str | Source | Sequence[str | Source]) -> list[Source]:
    listed = [sources] if isinstance(sources, (str, Source)) else list(sources)
    chosen = [source if isinstance(source, Source) else parse_source(source) for source in listed]
    if not chosen:
        raise DataError("name at least one source")
    for given, source in zip(listed, chosen):
        if isinstance(given, str) and source.guessed is not None:
            logger.warning("%s is read as %s, because it is %s", source.path, source, source.guessed)
    if len({(source.kind, source.path, source.split) for source in chosen}) < len(chosen):
        raise DataError(
            f"a source is named twice among {', '.join(map(str, chosen))}; give it a larger weight instead"
        )
    if len({source.weight is None for source in chosen}) > 1:
        raise DataError(f"give either all sources a weight or none: {', '.join(map(str, chosen))}")
    return chosen


def _check_for_a_row(
    reader: Reader, prompt_format: PromptFormat, skipped: SkippedRows, selection: Selection | None = None
) -> None:
    """Reads up to the first usable row, so that a run without data stops before it loads a model."""
    if next(render_source(reader, prompt_format, skipped, selection=selection), None) is None:
        examples = [f"{key}: {reason}" for found in skipped.examples.values() for key, reason in found[:1]]
        if selection is not None and not examples:
            raise DataError(
                f"{skipped.report()}, and a held-out share of {selection.share} leaves "
                f"{'none of them for evaluation' if selection.held_out else 'none of them to train on'}; take another "
                "share, or keep a source of its own for evaluation"
            )
        raise DataError(f"no usable row in {skipped.report()}; {'; '.join(examples) or 'it is empty'}")


def _mix(streams: list[IterableDataset], chosen: list[Source], seed: int, epochs: int | None) -> IterableDataset:
    if len(streams) == 1:
        return streams[0]
    weights = [source.weight or 1.0 for source in chosen]
    return interleave_datasets(
        streams,
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        # An endless source never runs out; otherwise every row must occur at least once.
        stopping_strategy="first_exhausted" if epochs is None else "all_exhausted",
    )
