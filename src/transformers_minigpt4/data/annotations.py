"""Reads annotation files, which list images and texts: LLaVA, cc_sbu_align, Localized Narratives, COCO, CSV, JSONL."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from transformers_minigpt4.utils.json_files import JsonText, brief, json_lines, open_regular, refuse_surrogates

from .readers import CAPTION_COLUMNS, BadRow, Entry, RawRow, caption_row, image_file
from .schema import DataError, Message, Part


Record: TypeAlias = dict[str, Any]  # an object of an annotation file, with any keys
# Records of a file, each with where it is, such as `line 3`, or why it cannot be read.
Located: TypeAlias = Iterator[tuple[str, Record | BadRow]]
_COCO_ADVICE = "give a captions file of COCO, such as captions_train2017.json"
_LLAVA_IMAGE = "<image>"
_LLAVA_ROLES = {"human": "user", "gpt": "assistant"}
METADATA = ("metadata.jsonl", "metadata.csv")  # of an image folder
PATH_COLUMNS = ("file_name", "image", "path", "image_path", "file")


def llava(path: Path, images: Path | None) -> Iterator[Entry]:
    """LLaVA's `[{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}]`, JSON or JSON Lines."""
    folder = images or path.parent
    records = _lines(path) if path.suffix == ".jsonl" else _list(path, "LLaVA's format is a list of conversations")
    for number, (where, record) in enumerate(records):
        if isinstance(record, BadRow):
            yield record
            continue
        key = str(record.get("id", number))
        try:
            yield _located(where, _conversation(key, record, folder))
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"not in LLaVA's format ({type(error).__name__}: {error}): {brief(record)}"
            yield _located(where, BadRow("entry", key, reason))


def llava_messages(conversations: list[Record], images: int | None = None) -> list[Message]:
    """
    The turns of a row in LLaVA's format as messages, in the order of the row and whatever this is.

    The authors' training puts an image before the words of its turn, wherever its mark was, takes several marks in a
    turn for one, and strips the text of such a turn alone.

    Args:
        conversations: The row's `[{"from": "human"|"gpt", "value"}]`.
        images: Images of the row. If it has as many marks, several in a turn stay several.

    Raises:
        KeyError, TypeError, AttributeError: for what is not in this format.
    """
    marks = [turn["value"].count(_LLAVA_IMAGE) for turn in conversations]
    several = images == sum(marks)
    messages: list[Message] = []
    for turn, here in zip(conversations, marks):
        text = turn["value"].replace(_LLAVA_IMAGE, "").strip() if here else turn["value"]
        content: list[Part] = [{"type": "image"} for _ in range(here if several else min(here, 1))]
        if text or not content:
            content.append({"type": "text", "text": text})
        messages.append({"role": _LLAVA_ROLES[turn["from"]], "content": content})
    return messages


def _conversation(key: str, record: Record, folder: Path) -> Entry:
    names = record.get("image")
    names = [names] if isinstance(names, str) else ([] if names is None else names)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return BadRow("image", key, f"`image` must be a file name, or a list of them, not {brief(record['image'])}")
    messages = llava_messages(record["conversations"], len(names))
    if messages and messages[0]["role"] == "assistant":
        messages = messages[1:]  # as in the authors' training
    for place, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[place % 2]:
            return BadRow("entry", key, f"turn {place} is out of order: {brief(message)}")
        if message["role"] == "assistant" and message["content"][0]["type"] == "image":
            return BadRow("entry", key, f"an answer contains {_LLAVA_IMAGE}")
        if not any(part["type"] == "image" or part["text"].strip() for part in message["content"]):
            return BadRow("caption" if place % 2 else "entry", key, f"turn {place} is empty")
    if not messages or len(messages) % 2:
        return BadRow("entry", key, f"{len(messages)} turns; every question needs an answer")
    placed = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placed != len(names):
        return BadRow("image", key, f"{placed} placeholders {_LLAVA_IMAGE} for {len(names) or 'no'} image")
    caption = messages[1]["content"][0]["text"] if len(messages) == 2 else None
    files = [file for name in names for file in image_file(folder, name)]
    return RawRow(key, files, caption, messages)


def cc_sbu_align(path: Path, images: Path | None) -> Iterator[Entry]:
    """The authors' stage-2 folder: `filter_cap.json` with `image_id` and `caption` of each `image/2.jpg`."""
    for where, record in _list(path / "filter_cap.json", "the authors' file has one", "annotations"):
        if isinstance(record, BadRow):
            yield record
        elif not isinstance(image_id := record.get("image_id"), (str, int)) or not str(image_id):
            yield BadRow("entry", where, f"no image_id: {brief(record)}")
        else:
            image = image_file(path / "image", f"{image_id}.jpg")
            yield _located(where, caption_row(str(image_id), image, record.get("caption")))


def coco(path: Path, images: Path | None) -> Iterator[Entry]:
    """COCO's captions: `images` with `id` and `file_name`, `annotations` with `image_id` and `caption`; a row each."""
    folder = images or path.parent
    names: dict[object, object] = {}
    for _, image in _list(path, _COCO_ADVICE, "images"):
        if isinstance(image, BadRow):
            yield image
        elif isinstance(image_id := image.get("id"), (str, int)):
            names[image_id] = image.get("file_name")
    for number, (where, record) in enumerate(_list(path, _COCO_ADVICE, "annotations")):
        if isinstance(record, BadRow):
            yield record
            continue
        key, image_id = str(record.get("id", number)), record.get("image_id")
        name = names.get(image_id) if isinstance(image_id, (str, int)) else None
        if isinstance(name, str) and name:
            yield _located(where, caption_row(key, image_file(folder, name), record.get("caption")))
        else:
            reason = f"image_id {brief(image_id)} is not among `images`, or has no file_name there"
            yield _located(where, BadRow("image", key, reason))


def localized_narratives(path: Path, images: Path | None) -> Iterator[Entry]:
    """Localized Narratives: JSON Lines with `dataset_id`, `image_id` and `caption`; traces are not read."""
    folder = images or path.parent
    for where, record in _lines(path):
        if isinstance(record, BadRow):
            yield record
            continue
        image_id = record.get("image_id")
        if not isinstance(image_id, (str, int)) or not str(image_id):
            yield BadRow("entry", where, f"no image_id: {brief(record)}")
            continue
        # COCO's file names are padded to twelve digits, the narratives' ids are not.
        width = 12 if str(record.get("dataset_id", "")).startswith("mscoco") else 0
        key = f"{image_id}/{record.get('annotator_id', where.removeprefix('line '))}"
        image = image_file(folder, f"{image_id!s:0>{width}}.jpg")
        yield _located(where, caption_row(key, image, record.get("caption")))


def table(path: Path, images: Path | None, captions: bool = True) -> Iterator[Entry]:
    """
    A CSV, TSV or JSON Lines file, or a JSON list, with a column for the path and one for the caption.

    Without `captions`, a table that may have none.
    """
    folder = images or path.parent
    suffix = path.suffix.lower()
    records: Located
    if suffix in (".jsonl", ".json"):
        records = (
            _list(path, "give a list of objects")
            if suffix == ".json" and JsonText(path).first() == "["
            else _lines(path)
        )
    else:
        records = _csv_rows(path, "\t" if suffix == ".tsv" else ",", captions)
    for where, record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        name = next((record[column] for column in PATH_COLUMNS if record.get(column)), None)
        caption = next((record[column] for column in CAPTION_COLUMNS if record.get(column)), None)
        if isinstance(name, str):
            yield caption_row(f"{where} ({name})", image_file(folder, name), caption)
        else:
            yield BadRow("image", where, f"no path under any of {', '.join(PATH_COLUMNS)}")


def imagefolder(path: Path, images: Path | None, captions: bool = True) -> Iterator[Entry]:
    """
    A Hugging Face image folder: images, and `metadata.csv` or `metadata.jsonl` with `file_name` and `caption`.

    Without `captions`, one that may have none.
    """
    for name in METADATA:
        if (path / name).is_file():
            return _named(name, table(path / name, path, captions))
    raise DataError(
        f"{path} contains no metadata.jsonl or metadata.csv; name the folder that has one, such as {path}/train"
    )


def _named(name: str, entries: Iterator[Entry]) -> Iterator[Entry]:
    """Entries whose bad ones name the file too, since the source names its folder."""
    for entry in entries:
        yield entry._replace(key=f"{name} {entry.key}") if isinstance(entry, BadRow) else entry


def _csv_rows(path: Path, delimiter: str, captions: bool) -> Located:
    # Bytes that are not UTF-8 become lone surrogates, which the rows are checked for.
    with (
        open_regular(path) as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        rows = csv.DictReader(file, delimiter=delimiter)
        try:
            columns = rows.fieldnames or []
        except csv.Error as error:
            raise DataError(f"{path} is not a table of text: {error}") from error
        for wanted in (PATH_COLUMNS, CAPTION_COLUMNS) if captions else (PATH_COLUMNS,):
            if not set(wanted) & set(columns):
                raise DataError(
                    f"{path} needs a column {' or '.join(wanted)}; it has {', '.join(columns)[:200] or 'none'}"
                )
        while True:
            try:
                row = next(rows)
                refuse_surrogates(row)
                yield f"line {rows.line_num}", row
            except StopIteration:
                return
            except csv.Error as error:  # a field of more than 128 KiB, which an open quote makes of what follows it
                where = f"line {rows.line_num + 1}"
                yield where, BadRow("entry", where, f"not a row of a table: {error}")
            except ValueError as error:
                where = f"line {rows.line_num}"
                yield where, BadRow("entry", where, f"not a row of a table: {error}")


def _lines(path: Path) -> Located:
    """The objects of a JSON Lines file."""
    for number, value in json_lines(path):
        yield f"line {number}", _record(f"line {number}", value)


def _list(path: Path, advice: str, key: str | None = None) -> Located:
    """The objects of the list in a JSON file, or of the list under a key of its object."""
    try:
        for number, item in enumerate(JsonText(path).items(key)):
            where = f"{key or 'entry'} {number} in line {item.line}"
            yield where, _record(where, item.value)
    except ValueError as error:
        raise DataError(f"{error}; {advice}") from error


def _record(where: str, value: object) -> Record | BadRow:
    if isinstance(value, ValueError):
        return BadRow("entry", where, str(value))
    return value if isinstance(value, dict) else BadRow("entry", where, f"not an object: {brief(value)}")


def _located(where: str, entry: Entry) -> Entry:
    """An entry; where it is, if it is a bad one, which people look for in the file."""
    return entry._replace(key=f"{where} ({entry.key})") if isinstance(entry, BadRow) else entry
