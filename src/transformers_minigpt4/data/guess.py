"""Guesses the kind of a source from a bare path: from names, and from the first bytes of a JSON file."""

import os
import re
from pathlib import Path

from transformers_minigpt4.utils.json_files import open_regular

from .annotations import METADATA, PATH_COLUMNS
from .readers import CAPTION_COLUMNS
from .schema import DataError
from .webdataset import HUB_ID, REMOTE, TAR_SUFFIXES


_HEAD = 1 << 16  # bytes of a JSON file that are looked at
# What says that a folder is of a kind: patterns in it.
_FOLDERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cc_sbu_align", ("filter_cap.json",)),
    ("imagefolder", METADATA),
    ("wds", tuple(f"*{suffix}" for suffix in TAR_SUFFIXES)),
    ("dataset", ("state.json", "*.parquet", "*/*.parquet")),
)
_KIND = re.compile(r"\w{2,}:(?!//)")  # in front of a path; a single letter would be a drive
_TABLES = (".csv", ".tsv")
_JSON = (".json", ".jsonl")


def guess_kind(path: str, kinds: tuple[str, ...]) -> tuple[str, str]:
    """
    The kind of a source that is named by its path alone, and what it was guessed from.

    Args:
        path: A file, a folder, a pattern or a URL.
        kinds: All kinds, for messages.

    Raises:
        DataError: if there is nothing at the path, or if it can be of several kinds or of none.
    """
    advice = f"write KIND:PATH, with KIND one of {', '.join(kinds)}"
    if _KIND.match(path) and not os.path.exists(path):
        raise DataError(f"{path!r} is not a source; {advice}")
    if path.lower().endswith(TAR_SUFFIXES) and not os.path.isdir(path):
        return "wds", "a tar file" if os.path.isfile(path) else "a pattern or a URL of tar files"
    if REMOTE.match(path):
        raise DataError(f"{path!r} is a URL of no known kind; {advice}")
    if os.path.isdir(path):
        return _kind_of_folder(Path(path), advice)
    if os.path.isfile(path):
        return _kind_of_file(Path(path), advice)
    if HUB_ID.fullmatch(path) and not os.path.exists(path):
        raise DataError(
            f"{path!r} is not a file or a folder here; for a dataset on the Hub, write dataset:{path} if it has "
            f"columns of images and captions, or wds:{path} if it consists of tar files"
        )
    raise DataError(f"{path!r} is not a source; {advice}")


def _kind_of_folder(folder: Path, advice: str) -> tuple[str, str]:
    found = {
        kind: match.relative_to(folder).as_posix()
        for kind, patterns in _FOLDERS
        if (match := next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)) is not None
    }
    if len(found) == 1:
        ((kind, name),) = found.items()
        return kind, f"a folder that contains {name}"
    if found:
        listed = ", ".join(f"{kind}:{folder} ({name})" for kind, name in found.items())
        raise DataError(f"{str(folder)!r} can be read in several ways; write one of {listed}")
    inside = next((path.parent for name in METADATA for path in sorted(folder.glob(f"*/{name}"))), None)
    hint = f"imagefolder:{inside}, which has metadata" if inside is not None else advice
    names = ", ".join(pattern for _, patterns in _FOLDERS for pattern in patterns)
    raise DataError(f"the kind of {str(folder)!r} cannot be guessed, it contains none of {names}; {hint}")


def _kind_of_file(path: Path, advice: str) -> tuple[str, str]:
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        return "table", f"a {suffix[1:].upper()} file"
    if suffix == ".parquet":
        return "dataset", "a Parquet file"
    if path.name == "filter_cap.json":
        raise DataError(f"{str(path)!r} belongs to a folder of images; write cc_sbu_align:{path.parent}")
    if suffix in _JSON and (kind := _kind_of_json(path)) is not None:
        return kind
    raise DataError(f"the kind of {str(path)!r} cannot be guessed from its name and its beginning; {advice}")


def _kind_of_json(path: Path) -> tuple[str, str] | None:
    with open_regular(path) as file:
        head = file.read(_HEAD).decode("utf-8-sig", errors="replace")
    keys = set(re.findall(r'"(\w+)"\s*:', head))
    if "conversations" in keys:
        return "llava", "a file of conversations"
    if {"dataset_id", "image_id", "annotator_id"} <= keys:
        return "locnarr", "a file with dataset_id, image_id and annotator_id"
    if head.lstrip().startswith("{") and {"images", "file_name"} <= keys:
        return "coco", "a file with images and their file_name"
    columns = [next((name for name in names if name in keys), None) for names in (PATH_COLUMNS, CAPTION_COLUMNS)]
    if None not in columns:
        return "table", f"a file with {columns[0]} and {columns[1]}"
    return None
