"""Reads images as captions and boxes: COCO's annotation files, or JSON Lines of one's own."""

import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers_minigpt4.data.readers import BadRow
from transformers_minigpt4.utils.json_files import brief, json_lines, list_entries

from .prompts import CAPTIONS, Box, Scene


_SCALE = 1000  # boxes have 3 decimals


class BadScene(ValueError):
    """Why an image cannot be used."""


def read_scenes(captions: Path, instances: Path | None) -> Iterator[Scene | BadRow]:
    """
    The images of COCO's files, or of a `.jsonl` file, in the files' order; those that cannot be used as `BadRow`.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is not in its format; the message begins with its path.
    """
    found = own_scenes(captions) if captions.suffix == ".jsonl" else coco_scenes(captions, instances)
    known: set[str] = set()
    for scene in found:
        if isinstance(scene, Scene) and scene.key in known:
            yield BadRow("duplicate", scene.key, "the same id twice")
            continue
        known.add(scene.key)
        yield scene


# COCO


class _Image(NamedTuple):
    name: str
    width: float
    height: float


def coco_scenes(captions: Path, instances: Path | None) -> Iterator[Scene | BadRow]:
    """
    The images of `captions_*.json`, with the boxes of `instances_*.json`.

    Both are read entry by entry. What stays in memory are names, captions and boxes, some 1 KB an image.
    """
    images: dict[int | None, _Image] = {}
    texts: dict[int | None, list[str]] = {}
    bad: list[BadRow] = []
    for key, entry in _entries(captions, ("images", "annotations")):
        if key == "images":
            try:
                images[_id(entry.get("id"))] = _image(entry)
            except BadScene as error:
                bad.append(BadRow("entry", str(entry.get("id", brief(entry))), str(error)))
        else:
            known = texts.setdefault(_id(entry.get("image_id")), [])
            text = one_line(entry.get("caption"))
            if text and len(known) < CAPTIONS:
                known.append(text)
    if not images:
        raise ValueError(f"{captions} lists no images; give COCO's captions_*.json, or a .jsonl file of your own")
    yield from bad
    boxes, names = _coco_boxes(instances, images) if instances is not None else ({}, {})
    for number, image in images.items():
        key, lines = Path(image.name).stem, texts.get(number)
        if not lines:
            yield BadRow("caption", key, "there is no caption")
        else:
            yield Scene(key, image.name, tuple(lines), tuple(_boxes(boxes.get(number, array("i")), names)))


def _coco_boxes(path: Path, images: dict[int | None, _Image]) -> "tuple[dict[int | None, array[int]], dict[int, str]]":
    """For each image, five numbers for each box: category, and corners in thousandths; and the categories' names."""
    boxes: dict[int | None, array[int]] = {}
    names: dict[int, str] = {}
    for key, entry in _entries(path, ("annotations", "categories")):
        if key == "categories":
            if (number := _id(entry.get("id"))) is not None:
                names[number] = one_line(entry.get("name"))
            continue
        number, category = _id(entry.get("image_id")), _id(entry.get("category_id"))
        image, sides = images.get(number), _numbers(entry.get("bbox"), 4)
        if image is None or category is None or sides is None:
            continue
        x, y, width, height = sides
        corners = clipped((x, y, x + width, y + height), image.width, image.height)
        if corners is not None:
            numbers = boxes.setdefault(number, array("i"))
            numbers.append(category)
            numbers.extend(round(corner * _SCALE) for corner in corners)
    if not names:
        raise ValueError(f"{path} lists no categories; give COCO's instances_*.json")
    return boxes, names


def _boxes(numbers: "array[int]", names: dict[int, str]) -> Iterator[Box]:
    for place in range(0, len(numbers), 5):
        category, *corners = numbers[place : place + 5]
        if name := names.get(category):
            x1, y1, x2, y2 = (corner / _SCALE for corner in corners)
            yield Box(name, (x1, y1, x2, y2))


def _entries(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, entry in list_entries(path):
        if key in keys:
            if not isinstance(entry, dict):
                raise ValueError(f"{path} is not COCO's format: {key} holds {brief(entry)}")
            yield key, entry


def _image(entry: dict[str, Any]) -> _Image:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise BadScene(f"no file_name: {brief(entry)}")
    check_name(name)
    return _Image(name, *_sides(entry))


def _id(value: object) -> int | None:
    """A number of COCO's, if it is one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31 else None


# One's own


def own_scenes(path: Path) -> Iterator[Scene | BadRow]:
    """
    JSON Lines with `image`, `captions` (a list, or `caption`), and optionally `id` and `boxes`.

    A box is `{"category", "box": [x1, y1, x2, y2]}`, in shares of width and height, or in pixels if the line has
    `width` and `height`.
    """
    for number, record in json_lines(path):
        key = f"line {number}"
        try:
            if isinstance(record, ValueError):
                raise BadScene(str(record))
            if not isinstance(record, dict):
                raise BadScene(f"it is not an object: {brief(record)}")
            yield _own_scene(record)
        except BadScene as error:
            yield BadRow("entry", key, str(error))


def _own_scene(record: dict[str, Any]) -> Scene:
    image = record.get("image")
    if not isinstance(image, str) or not image:
        raise BadScene(f"`image` is {brief(image)}, not the path of a file below the folder of images")
    check_name(image)
    captions = record.get("captions", [record.get("caption")])
    if not isinstance(captions, list):
        raise BadScene(f"`captions` is {brief(captions)}, not a list of texts")
    lines = tuple(filter(None, map(one_line, captions)))[:CAPTIONS]
    if not lines:
        raise BadScene("there is no caption")
    boxes = record.get("boxes") or []
    if not isinstance(boxes, list):
        raise BadScene(f"`boxes` is {brief(boxes)}, not a list")
    width, height = _sides({"width": 1, "height": 1, **record})
    key = record.get("id", Path(image).with_suffix("").as_posix())
    if not isinstance(key, (str, int)) or not str(key):
        raise BadScene(f"`id` is {brief(key)}, not a text")
    found = [_own_box(box, width, height) for box in boxes]
    return Scene(str(key), image, lines, tuple(box for box in found if box is not None))


def _own_box(box: object, width: float, height: float) -> Box | None:
    if not isinstance(box, dict) or not (category := one_line(box.get("category"))):
        raise BadScene(f"a box is {{'category', 'box'}}, not {brief(box)}")
    sides = _numbers(box.get("box"), 4)
    if sides is None:
        raise BadScene(f"the box of {category!r:.40} is {brief(box.get('box'))}, not [x1, y1, x2, y2]")
    if width == height == 1 and max(map(abs, sides)) > 2:
        raise BadScene(f"the box of {category!r:.40} is {brief(sides)}: in pixels, but without `width` and `height`")
    corners = clipped((sides[0], sides[1], sides[2], sides[3]), width, height)
    return Box(category, corners) if corners is not None else None


# Both


def clipped(
    corners: tuple[float, float, float, float], width: float, height: float
) -> tuple[float, float, float, float] | None:
    """
    A box clipped to its image, as shares with 3 decimals.

    Args:
        corners: x1, y1, x2, y2 in the unit of width and height.
        width, height: Of the image.

    Returns:
        `None` for a box without area within the image.
    """
    x1, x2 = (min(1.0, max(0.0, corners[place] / width)) for place in (0, 2))
    y1, y2 = (min(1.0, max(0.0, corners[place] / height)) for place in (1, 3))
    if x2 <= x1 or y2 <= y1:
        return None
    return round(x1, 3), round(y1, 3), round(x2, 3), round(y2, 3)


def check_name(name: str) -> None:
    """
    Raises:
        BadScene: for a path that is absolute or leaves the folder of images.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name or not name.isprintable():
        raise BadScene(f"{name!r:.80} is not a path below the folder of images")


def one_line(text: object) -> str:
    """A text on one line, as messages have captions; nothing for what is not a text."""
    return " ".join(text.splitlines()).strip() if isinstance(text, str) else ""


def _sides(entry: dict[str, Any]) -> tuple[float, float]:
    """Width and height of an image."""
    sides = _numbers([entry.get("width"), entry.get("height")], 2)
    if sides is None or min(sides) <= 0:
        raise BadScene(f"width and height are {brief([entry.get('width'), entry.get('height')])}")
    return sides[0], sides[1]


def _numbers(values: object, count: int) -> list[float] | None:
    """So many numbers, or nothing for what is not a list of as many."""
    if not isinstance(values, list) or len(values) != count:
        return None
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        return None
    return values
