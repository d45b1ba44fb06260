"""The authors' stage-2 folder `cc_sbu_align`, read as a data set and written from one, pictures byte for byte."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from .cards import read_facts


if TYPE_CHECKING:
    from datasets import Dataset


def read_cc_sbu_align(folder: str | os.PathLike) -> "Dataset":
    """
    The authors' stage-2 folder as a data set.

    `filter_cap.json` holds `{"annotations": [{"image_id": "2", "caption": "…"}]}`, and `image/2.jpg` the picture.

    Returns:
        `Dataset`: columns `image` ([`~datasets.Image`], the files' own bytes), `image_id` and `caption`.

    Raises:
        ValueError: for another format, a missing or unreadable picture, an id that comes twice, an empty caption.
    """
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder = Path(folder)
    path = folder / "filter_cap.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no filter_cap.json; name a folder in the form of the authors' cc_sbu_align")
    annotations = read_facts(folder, path.name).get("annotations")
    if not isinstance(annotations, list) or not annotations:
        raise ValueError(f'{path} has no list "annotations", or an empty one')
    rows: dict[str, list[str]] = {"image": [], "image_id": [], "caption": []}
    seen: set[str] = set()
    for number, entry in enumerate(annotations):
        where = f"{path}, annotation {number}"
        image_id, caption = _annotation(entry, where)
        if image_id in seen:
            raise ValueError(f"{where}: the id {image_id!r} comes twice; each picture has one caption")
        seen.add(image_id)
        picture = folder / "image" / f"{image_id}.jpg"
        _check_image(picture, where)
        for column, value in zip(rows, (str(picture), image_id, caption)):
            rows[column].append(value)
    features = Features({"image": ImageFeature(), "image_id": Value("string"), "caption": Value("string")})
    return Dataset.from_dict(rows, features=features)


def _annotation(entry: Any, where: str) -> tuple[str, str]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no object with image_id and caption, but {entry!r:.80}")
    image_id, caption = entry.get("image_id"), entry.get("caption")
    if isinstance(image_id, int) and not isinstance(image_id, bool):
        image_id = str(image_id)
    # An id becomes a file name, and must not lead out of the folder.
    if not isinstance(image_id, str) or not image_id.strip() or image_id != Path(image_id).name or "\\" in image_id:
        raise ValueError(f"{where}: {image_id!r} cannot be an image_id; it names a file and is not empty")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"{where}: the caption of image {image_id!r} is empty; write one or remove the entry")
    return image_id, caption


def _check_image(path: Path, where: str) -> None:
    if not path.is_file():
        raise ValueError(f"{where}: there is no picture {path}")
    try:
        with Image.open(path) as picture:
            picture.verify()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{where}: {path} is no picture that can be read ({error})") from error


def write_cc_sbu_align(dataset: "Dataset", folder: str | os.PathLike) -> None:
    """
    Writes a data set as the authors' `cc_sbu_align` folder; it appears under its name only when it is complete.

    Every picture goes to `image/ID.jpg` byte for byte as it is stored. A picture of another format keeps its bytes
    under that name, which the authors' loader opens all the same.

    Args:
        dataset: With columns `image`, `image_id` and `caption`.
        folder: Must not exist, or be empty.

    Raises:
        ValueError: for missing columns, a folder with content, an empty caption, an id that comes twice or is no name.
    """
    from datasets import Image as ImageFeature

    folder = Path(folder)
    missing = {"image", "image_id", "caption"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"the data set lacks {', '.join(sorted(missing))}; rename or add these columns")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (scratch / "image").mkdir()
        annotations, seen = [], set()
        for number, row in enumerate(dataset.cast_column("image", ImageFeature(decode=False))):
            image_id, caption = _annotation(row, f"row {number}")
            if image_id in seen:
                raise ValueError(f"row {number}: the id {image_id!r} comes twice; each picture has one caption")
            seen.add(image_id)
            (scratch / "image" / f"{image_id}.jpg").write_bytes(image_bytes(row["image"], number))
            annotations.append({"image_id": image_id, "caption": caption})
        text = json.dumps({"annotations": annotations}, ensure_ascii=False)
        (scratch / "filter_cap.json").write_text(text, encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp's folder is the owner's alone
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def image_bytes(image: dict[str, Any] | None, number: int) -> bytes:
    if image is None or (image["bytes"] is None and not image["path"]):
        raise ValueError(f"row {number} has no picture")
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
