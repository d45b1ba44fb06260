"""Reads annotation files, which list images and texts: LLaVA, cc_sbu_align, Localized Narratives, COCO, CSV, JSONL."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from .readers import CAPTION_COLUMNS, BadRow, Entry, RawRow, caption_row, image_file
from .schema import DataError, Message, Part


Record: TypeAlias = dict[str, Any]  # an object of an annotation file, with any keys
_LLAVA_IMAGE = "<image>"
_LLAVA_ROLES = {"human": "user", "gpt": "assistant"}
_PATH_COLUMNS = ("file_name", "image", "path", "image_path", "file")


def llava(path: Path, images: Path | None) -> Iterator[Entry]:
    """LLaVA's `[{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}]`, JSON or JSON Lines."""
    folder = images or path.parent
    records = json_lines(path) if path.suffix == ".jsonl" else enumerate(_json_list(path))
    for number, record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        key = str(record.get("id", number)) if isinstance(record, dict) else str(number)
        try:
            yield _conversation(key, record, folder)
        except (KeyError, TypeError, AttributeError) as error:
            yield BadRow("entry", key, f"not in LLaVA's format ({type(error).__name__}: {error}): {record!r:.80}")


def _conversation(key: str, record: Record, folder: Path) -> Entry:
    name = record.get("image")
    if not (name is None or (isinstance(name, str) and name)):
        return BadRow("image", key, f"`image` must be a file name, not {name!r:.40}")
    messages: list[Message] = []
    placed = 0
    for turn in record["conversations"]:
        role, text = _LLAVA_ROLES.get(turn["from"]), turn["value"]
        if role != ("user", "assistant")[len(messages) % 2] or not isinstance(text, str):
            return BadRow("entry", key, f"turn {len(messages)} is out of order or not a text: {turn!r:.60}")
        here = text.count(_LLAVA_IMAGE)
        if role == "assistant" and here:
            return BadRow("entry", key, f"an answer contains {_LLAVA_IMAGE}")
        placed += here
        text = text.replace(_LLAVA_IMAGE, "").strip()
        # LLaVA's own training puts the image before the words, wherever its placeholder was.
        content: list[Part] = [{"type": "image"} for _ in range(here)]
        if text:
            content.append({"type": "text", "text": text})
        if not content:
            return BadRow("caption" if role == "assistant" else "entry", key, f"turn {len(messages)} is empty")
        messages.append({"role": role, "content": content})
    if not messages or len(messages) % 2:
        return BadRow("entry", key, f"{len(messages)} turns; every question needs an answer")
    if placed != (name is not None):
        return BadRow(
            "image", key, f"{placed} placeholders {_LLAVA_IMAGE} for {'no' if name is None else 'one'} image"
        )
    caption = messages[1]["content"][0]["text"] if len(messages) == 2 else None
    return RawRow(key, image_file(folder, name) if name is not None else [], caption, messages)


def cc_sbu_align(path: Path, images: Path | None) -> Iterator[Entry]:
    """The authors' stage-2 folder: `filter_cap.json` with `image_id` and `caption` of each `image/2.jpg`."""
    for number, record in enumerate(_annotated(path / "filter_cap.json")["annotations"]):
        image_id = record.get("image_id") if isinstance(record, dict) else None
        if not isinstance(image_id, (str, int)) or not str(image_id):
            yield BadRow("entry", str(number), f"no image_id: {record!r:.80}")
        else:
            yield caption_row(str(image_id), image_file(path / "image", f"{image_id}.jpg"), record.get("caption"))


def coco(path: Path, images: Path | None) -> Iterator[Entry]:
    """COCO's captions: `images` with `id` and `file_name`, `annotations` with `image_id` and `caption`; a row each."""
    folder = images or path.parent
    captions = _annotated(path)
    listed = captions.get("images")
    if not isinstance(listed, list):
        raise DataError(f'{path} has no list "images"; give a captions file of COCO, such as captions_train2017.json')
    names = {image.get("id"): image.get("file_name") for image in listed if isinstance(image, dict)}
    for number, record in enumerate(captions["annotations"]):
        if not isinstance(record, dict):
            yield BadRow("entry", str(number), f"not an object: {record!r:.80}")
            continue
        key = str(record.get("id", number))
        if name := names.get(record.get("image_id")):
            yield caption_row(key, image_file(folder, name), record.get("caption"))
        else:
            yield BadRow("image", key, f"image_id {record.get('image_id')!r} is not among `images`")


def localized_narratives(path: Path, images: Path | None) -> Iterator[Entry]:
    """Localized Narratives: JSON Lines with `dataset_id`, `image_id` and `caption`; traces are not read."""
    folder = images or path.parent
    for number, record in json_lines(path):
        if isinstance(record, BadRow):
            yield record
            continue
        image_id = record.get("image_id")
        if not isinstance(image_id, (str, int)) or not str(image_id):
            yield BadRow("entry", f"line {number}", f"no image_id: {record!r:.80}")
            continue
        # COCO's file names are padded to twelve digits, the narratives' ids are not.
        width = 12 if str(record.get("dataset_id", "")).startswith("mscoco") else 0
        key = f"{image_id}/{record.get('annotator_id', number)}"
        yield caption_row(key, image_file(folder, f"{image_id!s:0>{width}}.jpg"), record.get("caption"))


def table(path: Path, images: Path | None) -> Iterator[Entry]:
    """A CSV or JSON Lines file with a column for the path and one for the caption."""
    folder = images or path.parent
    records = json_lines(path) if path.suffix in (".jsonl", ".json") else _csv_rows(path)
    for number, record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        name = next((record[column] for column in _PATH_COLUMNS if record.get(column)), None)
        caption = next((record[column] for column in CAPTION_COLUMNS if record.get(column)), None)
        if isinstance(name, str):
            yield caption_row(f"line {number} ({name})", image_file(folder, name), caption)
        else:
            yield BadRow("image", f"line {number}", f"no path under any of {', '.join(_PATH_COLUMNS)}")


def imagefolder(path: Path, images: Path | None) -> Iterator[Entry]:
    """A Hugging Face image folder: images, and `metadata.csv` or `metadata.jsonl` with `file_name` and `caption`."""
    for name in ("metadata.jsonl", "metadata.csv"):
        if (path / name).is_file():
            return table(path / name, path)
    raise DataError(
        f"{path} contains no metadata.jsonl or metadata.csv; name the folder that has one, such as {path}/train"
    )


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            for wanted in (_PATH_COLUMNS, CAPTION_COLUMNS):
                if not set(wanted) & set(columns):
                    raise DataError(
                        f"{path} needs a column {' or '.join(wanted)}; it has {', '.join(columns) or 'none'}"
                    )
            for row in rows:
                yield rows.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[int, Record | BadRow]]:
    """(line number from 1, object or `BadRow`) of a JSON Lines file, read line by line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                record = BadRow("entry", f"line {number}", f"not JSON: {error}")
            if not isinstance(record, (dict, BadRow)):
                record = BadRow("entry", f"line {number}", f"not an object: {record!r:.80}")
            yield number, record


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON, or was cut short: {error}") from error


def _json_list(path: Path) -> list[Record]:
    records = _json(path)
    if not isinstance(records, list):
        raise DataError(f"{path} contains a {type(records).__name__}, but LLaVA's format is a list of conversations")
    return records


def _annotated(path: Path) -> Record:
    record = _json(path)
    if not isinstance(record, dict) or not isinstance(record.get("annotations"), list):
        raise DataError(f'{path} has no list "annotations"')
    return record
