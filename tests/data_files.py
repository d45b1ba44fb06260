"""Makes tiny sources of every format: images of one color, whose captions give their number."""

import csv
import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def color(number: int) -> tuple[int, int, int]:
    return (number * 7 % 256, number // 40 * 50 % 256, 90)


def image_bytes(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color(number)).save(file, format=kind)
    return file.getvalue()


def image_files(folder: Path, numbers, name="{}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        kind = "JPEG" if name.endswith(".jpg") else "PNG"
        (folder / name.format(number)).write_bytes(image_bytes(number, kind))
    return folder


def caption(number: int) -> str:
    return f"Image {number}"


def sample(number: int) -> dict[str, bytes]:
    """Files of one sample of a shard."""
    return {"png": image_bytes(number), "json": json.dumps({"caption": caption(number)}).encode()}


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def shards(folder: Path, count: int, rows: int, start: int = 0) -> str:
    """`count` shards with `rows` samples each; returns the source."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(count):
        numbers = range(start + place * rows, start + (place + 1) * rows)
        shard(folder / f"{place:05}.tar", {f"{number:09}": sample(number) for number in numbers})
    return f"wds:{folder}/{{00000..{count - 1:05}}}.tar"


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_lines(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def number_of(row: dict) -> int:
    """The number in a row's caption, after a look at the image's color."""
    number = int(row["completion"].removesuffix("###").split()[1])
    if row["images"] and isinstance(row["images"][0], Image.Image):
        found = row["images"][0].getpixel((3, 3))
        assert all(abs(a - b) <= 6 for a, b in zip(found, color(number))), (found, color(number))
    return number


def numbers(rows) -> list[int]:
    return [number_of(row) for row in rows]
