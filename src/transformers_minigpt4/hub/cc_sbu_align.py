"""The authors' stage-2 folder `cc_sbu_align`, read as a dataset and written from one, images byte for byte."""

import json
import os
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import UnidentifiedImageError

from transformers_minigpt4.data.images import image_bytes
from transformers_minigpt4.data.schema import UndecodedImage
from transformers_minigpt4.processing.image_utils_minigpt4 import open_image
from transformers_minigpt4.utils.files import atomic_folder

from .cards import read_facts


def read_cc_sbu_align(folder: str | os.PathLike[str]) -> Dataset:
    """
    The authors' stage-2 folder as a dataset.

    `filter_cap.json` contains `{"annotations": [{"image_id": "2", "caption": "…"}]}`, and `image/2.jpg` is the image.

    Returns:
        `Dataset`: columns `image` ([`~datasets.Image`], the files' own bytes), `image_id` and `caption`.

    Raises:
        ValueError: for another format, a missing or unreadable image, a duplicate id, an empty caption.
    """
    folder = Path(folder)
    path = folder / "filter_cap.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} contains no filter_cap.json; name a folder in the format of the authors' cc_sbu_align"
        )
    annotations = read_facts(folder, path.name).get("annotations")
    if not isinstance(annotations, list) or not annotations:
        raise ValueError(f'{path} has no list "annotations", or an empty one')
    rows: dict[str, list[str]] = {"image": [], "image_id": [], "caption": []}
    seen: set[str] = set()
    for number, entry in enumerate(annotations):
        where = f"{path}, annotation {number}"
        image_id, caption = _annotation(entry, where)
        if image_id in seen:
            raise ValueError(f"{where}: the id {image_id!r} occurs twice; each image has one caption")
        seen.add(image_id)
        image = folder / "image" / f"{image_id}.jpg"
        _check_image(image, where)
        for column, value in zip(rows, (str(image), image_id, caption)):
            rows[column].append(value)
    features = Features({"image": ImageFeature(), "image_id": Value("string"), "caption": Value("string")})
    return Dataset.from_dict(rows, features=features)


def _annotation(entry: object, where: str) -> tuple[str, str]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not an object with image_id and caption, but {entry!r:.80}")
    image_id, caption = entry.get("image_id"), entry.get("caption")
    if isinstance(image_id, int) and not isinstance(image_id, bool):
        image_id = str(image_id)
    # An id becomes a file name, and must not lead out of the folder.
    if not isinstance(image_id, str) or not image_id.strip() or image_id != Path(image_id).name or "\\" in image_id:
        raise ValueError(f"{where}: {image_id!r} cannot be an image_id; it is a file name and not empty")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"{where}: the caption of image {image_id!r} is empty; write one or remove the entry")
    return image_id, caption


def _check_image(path: Path, where: str) -> None:
    if not path.is_file():
        raise ValueError(f"{where}: there is no image {path}")
    try:
        with open_image(path) as image:
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{where}: {path} is not a readable image ({error})") from error


def write_cc_sbu_align(dataset: Dataset, folder: str | os.PathLike[str]) -> None:
    """
    Writes a dataset as the authors' `cc_sbu_align` folder; it appears under its name only when it is complete.

    Every image is written to `image/ID.jpg` byte for byte as it is stored. An image of another format keeps its bytes
    under that name, which the authors' loader opens nevertheless.

    Args:
        dataset: With columns `image`, `image_id` and `caption`.
        folder: Must not exist, or be empty.

    Raises:
        ValueError: for missing columns, a folder with content, an empty caption, an id that is a duplicate or cannot
            be a file name.
    """
    folder = Path(folder)
    missing = {"image", "image_id", "caption"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"the dataset lacks {', '.join(sorted(missing))}; rename or add these columns")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name another folder")
    with atomic_folder(folder) as scratch:
        (scratch / "image").mkdir()
        annotations, seen = [], set()
        for number, row in enumerate(dataset.cast_column("image", ImageFeature(decode=False))):
            image_id, caption = _annotation(row, f"row {number}")
            if image_id in seen:
                raise ValueError(f"row {number}: the id {image_id!r} occurs twice; each image has one caption")
            seen.add(image_id)
            (scratch / "image" / f"{image_id}.jpg").write_bytes(image_file(row["image"], number))
            annotations.append({"image_id": image_id, "caption": caption})
        text = json.dumps({"annotations": annotations}, ensure_ascii=False)
        (scratch / "filter_cap.json").write_text(text, encoding="utf-8")


def image_file(image: UndecodedImage | None, number: int) -> bytes:
    """
    Content of the image file in row `number` of a dataset.

    Raises:
        ValueError: for a row without an image.
    """
    if image is None or (image["bytes"] is None and not image["path"]):
        raise ValueError(f"row {number} has no image")
    return image_bytes(image)
