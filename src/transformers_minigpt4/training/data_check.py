"""Checks a source: what is usable, what is wrong, how long captions are, what images show, how fast it loads."""

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from transformers import BlipImageProcessorPil

from transformers_minigpt4.data.prompt_formats import PromptFormat
from transformers_minigpt4.data.schema import Row, answer_text
from transformers_minigpt4.data.skipped_rows import KINDS, SkippedRows
from transformers_minigpt4.data.sources import Source, open_reader, open_rows, parse_source, render_source
from transformers_minigpt4.utils.text import first_line

from .row_tokens import RowReader, marked_text, marked_tokens


_BARS = 40  # characters of the histogram's longest bar
_BUCKETS = 12
_SHOWN = 2000  # characters of a value
_THUMBNAIL, _MARGIN, _LINE, _CHARACTERS, _COLUMNS = 192, 10, 15, 34, 6


@dataclass
class Check:
    """What [`check_source`] found."""

    source: str
    skipped: SkippedRows
    words: list[int] = field(default_factory=list)
    images: list[tuple[Image.Image, str]] = field(default_factory=list)
    shards: int = 0
    complete: bool = True
    shown: list[tuple[str, str]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cut: int = 0
    limit: int | None = None

    def report(self) -> str:
        """The findings as text."""
        (seen,) = self.skipped.counts().values()
        read = "all of them" if self.complete else "up to the limit"
        lines = [
            self.source,
            report_line("shards", self.shards),
            report_line("rows", f"{seen['rows']} read, {read}"),
            report_line("usable", len(self.words)),
        ]
        for kind, meaning in KINDS.items():
            if seen[kind]:
                lines.append(report_line(kind, f"{seen[kind]}: {meaning}"))
                examples = self.skipped.examples[self.skipped.sources[0], kind]
                lines += [report_line("", f"{key}: {reason}") for key, reason in examples]
        if self.words:
            lines += ["  words", *(f"    {line}" for line in histogram(self.words))]
        lines += self._lengths()
        for name, value in self.shown:
            lines.append(report_line(name, value))
        return "\n".join(lines)

    def _lengths(self) -> list[str]:
        if not self.words:
            return []
        if not self.tokens:
            return [report_line("tokens", "not counted, and neither is what is cut: name the model with --model")]
        ordered = sorted(self.tokens)
        lines = [report_line("tokens", f"median {ordered[len(ordered) // 2]}, maximum {ordered[-1]} in a row")]
        if self.limit is not None:
            share = f"{self.cut} of {len(ordered)} rows ({self.cut / len(ordered):.1%})"
            lines.append(report_line("cut", f"{share} have an answer of more than {self.limit} tokens"))
        return lines


def report_line(name: str, value: object) -> str:
    """
    A line of the report, with the name in a column as wide as the longest kind of skipped row.

    Control characters, with which a caption could write to the terminal, are escaped, and long values cut.
    """
    text = str(value)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]} … ({len(text):,} characters)"
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return f"  {name:<{max(map(len, KINDS))}} {text}"


def check_source(
    source: str | Source,
    prompt_format: PromptFormat = "stage2",
    *,
    limit: int | None = 1000,
    shuffle: bool = False,
    max_images: int = 24,
    reader: RowReader | None = None,
    show: int = 3,
) -> Check:
    """
    Reads rows of a source as training would, and decodes their images.

    Args:
        source: What [`parse_source`] reads, or its result.
        prompt_format: The prompt format that the rows must fit.
        limit: How many rows to read, including bad ones; `None` for all.
        shuffle: Whether to read them in random order, not from the start.
        max_images: How many of the first usable rows to keep for a contact sheet.
        reader: Tokenizes the rows as training does; without one, rows are shown as text.
        show: How many of the first usable rows to show.

    Raises:
        DataError: for a source that cannot be opened.
    """
    source = source if isinstance(source, Source) else parse_source(source)
    rows_of = open_reader(source)
    skipped = SkippedRows([str(source)], max_error_rate=None, log=False)
    check = Check(str(source), skipped, shards=rows_of.num_shards, limit=reader.limit if reader is not None else None)
    rows = render_source(rows_of, prompt_format, skipped, seed=42 if shuffle else None, limit=limit)
    for row in rows:
        if not _read(row, check, reader, show):
            continue
        text = answer_text(row)
        check.words.append(len(text.split()))
        if len(check.images) < max_images and row["images"]:
            thumbnail = row["images"][0].copy()
            thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
            check.images.append((thumbnail, text.strip()))
    (seen,) = skipped.counts().values()
    check.complete = limit is None or seen["rows"] < limit
    return check


def _read(row: Row, check: Check, reader: RowReader | None, show: int) -> bool:
    """Tokenizes a row, and shows one of the first; whether the model can be trained on it."""
    is_shown = sum(name == "row" for name, _ in check.shown) < show
    sizes = ", ".join(f"{image.width} x {image.height} pixels" for image in row["images"]) or "none"
    if reader is None:
        lines = [("text", marked_text(row).plain.strip())]
    else:
        # Tokens do not depend on what an image shows, and a small one is prepared quickly.
        small = {**row, "images": [Image.new("RGB", (8, 8)) for _ in row["images"]]}
        try:
            tokens, is_cut = reader.tokens(small)
        except ValueError as error:
            check.skipped.add(0, "prompt_format", row["key"], first_line(error))
            return False
        check.tokens.append(len(tokens))
        check.cut += is_cut
        learned = sum(learns for _, learns in tokens)
        how = f"{len(tokens)}, {learned} of them learned, in brackets{', after the cut' if is_cut else ''}"
        lines = [("text", marked_tokens(tokens).plain.strip()), ("tokens", how)]
    if is_shown:
        check.shown += [("row", row["key"]), ("image", sizes), *lines]
    return True


def loader_throughput(
    source: str | Source,
    prompt_format: PromptFormat = "stage2",
    *,
    workers: int = 0,
    seconds: float = 5.0,
    size: int = 224,
) -> float:
    """
    Rows per second that a loader reads, decodes and resizes, without a model.

    Args:
        source: What [`parse_source`] reads, or its result.
        prompt_format: The prompt format of the rows.
        workers: Data workers; 0 for this process only.
        seconds: How long to measure, after the first batch.
        size: Side of the resized images, in pixels.

    Raises:
        DataError: for a source that cannot be opened, or has no usable row.
    """
    rows = open_rows(source, prompt_format, min_shards=max(1, workers), max_error_rate=None)
    collate = _Resize(BlipImageProcessorPil(size={"height": size, "width": size}))
    loader = DataLoader(rows.dataset, batch_size=32, num_workers=workers, collate_fn=collate)
    batches = iter(loader)
    next(batches)  # starts the workers
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        count += next(batches)
    return count / elapsed


class _Resize:
    """Prepares the images of a batch as training would, and returns its number of rows."""

    def __init__(self, image_processor: BlipImageProcessorPil) -> None:
        self.image_processor = image_processor

    def __call__(self, rows: list[Row]) -> int:
        images = [image for row in rows for image in row["images"]]
        if images:
            self.image_processor(images, return_tensors="pt")
        return len(rows)


def histogram(values: Sequence[int]) -> list[str]:
    """Lines of a histogram of integers, with bars on one scale."""
    width = max(1, -(-(max(values) + 1) // _BUCKETS))
    counts = [0] * (max(values) // width + 1)
    for value in values:
        counts[value // width] += 1
    ordered = sorted(values)
    lines = [f"median {ordered[len(ordered) // 2]}, minimum {ordered[0]}, maximum {ordered[-1]}"]
    for place, count in enumerate(counts):
        first, last = place * width, (place + 1) * width - 1
        label = str(first) if first == last else f"{first}-{last}"
        bar = "#" * round(_BARS * count / max(counts)) or ("." if count else "")
        lines.append(f"{label:>9} {count:>8} {bar}".rstrip())
    return lines


def save_contact_sheet(path: Path, images: Sequence[tuple[Image.Image, str]]) -> None:
    """
    Writes a PNG of images, each with its text below.

    Raises:
        ValueError: when there is no image.
    """
    if not images:
        raise ValueError("there is no image for the contact sheet")
    font = ImageFont.load_default(11)
    texts = [textwrap.wrap(text, _CHARACTERS, max_lines=8, placeholder=" …") for _, text in images]
    columns = min(_COLUMNS, len(images))
    cell_width = _THUMBNAIL + _MARGIN
    heights = [  # of each row of cells
        _THUMBNAIL + _MARGIN + _LINE * max(map(len, texts[start : start + columns]))
        for start in range(0, len(images), columns)
    ]
    sheet = Image.new("RGB", (columns * cell_width + _MARGIN, sum(heights) + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for number, ((image, _), lines) in enumerate(zip(images, texts)):
        left = (number % columns) * cell_width + _MARGIN
        top = sum(heights[: number // columns]) + _MARGIN
        sheet.paste(image, (left, top + _THUMBNAIL - image.height))
        for place, line in enumerate(lines):
            pen.text((left, top + _THUMBNAIL + place * _LINE + 2), line, fill=(25, 25, 25), font=font)
    sheet.save(path, format="PNG")
