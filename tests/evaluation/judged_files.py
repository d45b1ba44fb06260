"""Data of the judged tasks in their official forms, small, for the tests."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def write_image(path: Path, colour: str = "grey") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def write_coco(folder: Path, captions: dict[int, list[str]], images: str = "val2014") -> Path:
    """A COCO captions file in `annotations/`, with its images in the folder `images`."""
    (folder / "annotations").mkdir(parents=True)
    content: dict[str, Any] = {
        "info": {},
        "licenses": [],
        "images": [{"id": key, "file_name": f"COCO_val2014_{key:012d}.jpg"} for key in captions],
        "annotations": [
            {"id": 100 * key + number, "image_id": key, "caption": caption}
            for key, texts in captions.items()
            for number, caption in enumerate(texts)
        ],
    }
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    for key in captions:
        write_image(folder / images / f"COCO_val2014_{key:012d}.jpg")
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_advanced(folder: Path, images: int = 2, described: bool = True) -> Path:
    for task in ("meme", "recipe", "advertisement", "poem"):
        names = [f"{number:02d}.png" for number in range(images)]
        for name in names:
            write_image(folder / task / name)
        if described:
            rows = [{"image": name, "description": f"A {task} numbered {name}."} for name in names]
            write_lines(folder / task / "descriptions.jsonl", rows)
    return folder
