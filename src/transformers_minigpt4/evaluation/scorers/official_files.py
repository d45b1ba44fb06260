"""Checks shared by the tasks that read official files: unique ids, required fields, images of the same split."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from transformers_minigpt4.utils.files import JsonObject

from ..evaluator import read_json


def read_object(path: Path) -> JsonObject:
    """
    A JSON file that is one object of records by id, as GQA's and ScienceQA's are.

    Raises:
        ValueError: if the file does not exist or is something else, or a key is repeated, which a plain JSON reader
            would silently accept.
    """
    try:
        content = read_json(path, _object)
    except _TwiceError as error:
        raise ValueError(f"{str(path)!r} holds the id {error} twice; fetch the official file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not records by id; give the official file")
    return content


class _TwiceError(Exception):
    """A repeated key; not a `ValueError`, which would be reported as damaged JSON."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(repr(next(key for key in keys if keys.count(key) > 1)))
    return content


def by_id(path: Path, rows: object, key: str) -> dict[str, JsonObject]:
    """
    The records of a list by one of their fields, as text, in order.

    Raises:
        ValueError: if `rows` is not a list of objects, one lacks the field, or an id is repeated.
    """
    if not isinstance(rows, list):
        raise ValueError(f"{str(path)!r} holds a {type(rows).__name__}, not a list of records; give the official file")
    found: dict[str, JsonObject] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or key not in row:
            raise ValueError(f"record {number} of {str(path)!r} has no field {key!r}; give the official file")
        name = str(row[key])
        if name in found:
            raise ValueError(f"{str(path)!r} holds the id {name!r} twice; fetch the official file again")
        found[name] = row
    return found


def need_fields(path: Path, name: str, row: object, fields: Mapping[str, type | tuple[type, ...]]) -> None:
    """
    Check that a record has fields of their types.

    Raises:
        ValueError: with the record and the field.
    """
    for field, kind in fields.items():
        if not isinstance(row, dict) or field not in row:
            raise ValueError(
                f"{name!r} in {str(path)!r} has no field {field!r}; give the official file of a split with answers"
            )
        if not isinstance(row[field], kind):
            raise ValueError(
                f"the field {field!r} of {name!r} in {str(path)!r} is a {type(row[field]).__name__}; give the "
                "official file"
            )


def check_choices(path: Path, name: str, choices: Sequence[object], answer: int) -> None:
    """
    Check the options of a question and the number of the right one.

    Raises:
        ValueError: if an option is not a string, or the number does not belong to an option.
    """
    if not all(isinstance(choice, str) for choice in choices) or not 0 <= answer < len(choices) <= 26:
        raise ValueError(
            f"{name!r} in {str(path)!r} has the options {list(choices)!r:.80} and the right one is number {answer}; "
            "give the official file"
        )


def find_images(root: Path, folders: Iterable[str], names: Iterable[str], source: Path) -> dict[str, str]:
    """
    Finds images by name.

    Args:
        root: Folder of the data.
        folders: Folders inside it, in the order in which they are searched; `"."` is `root` itself.
        names: File names, as the annotations give them.
        source: The annotations, for the error.

    Returns:
        Path by name. A missing image gets the path where it should be, so that its questions fail one by one.

    Raises:
        ValueError: if there are names, but none of the images is there.
    """
    folders = list(folders)
    found: dict[str, str] = {}
    missing = 0
    for name in dict.fromkeys(names):
        candidates = [root / folder / name for folder in folders]
        there = next((path for path in candidates if path.is_file()), None)
        missing += there is None
        found[name] = str(there or candidates[0])
    if found and missing == len(found):
        raise ValueError(
            f"none of the {len(found)} images that {str(source)!r} names is in {str(root)!r} or its folders "
            f"{', '.join(folder for folder in folders if folder != '.')}, such as {next(iter(found))!r}; put them "
            "there, and check that annotations and images are of the same split"
        )
    return found
