"""Writes a recipe with the keys that the command line overrides, ready to save and run."""

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import yaml

from .recipe import GROUPS, RecipeParser, normalize_options, unknown_keys
from .recipe_files import find_recipe


_UNSET = object()


def resolved_recipe(words: list[str]) -> str:
    """
    The text of a recipe with the values of a command line: comments and order are kept, new keys come last.

    Args:
        words (`list[str]`): `--config RECIPE`, and options as [`parse_recipe`] takes them.

    Returns:
        `str`: YAML, which gives the same run as `words`.

    Raises:
        ValueError: for a recipe or a key that does not exist, and a value that its key cannot have.
    """
    words = normalize_options(words)
    place = words.index("--config")
    text = Path(find_recipe(words[place + 1])).read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, Mapping):
        raise ValueError("The recipe is not a mapping of keys to values.")
    if unknown := [f"--{key}" for key in recipe if key not in _keys() | {"env"}]:
        raise ValueError(unknown_keys(unknown))
    text = text if text.endswith("\n") else f"{text}\n"
    for key, value in _given(words[:place] + words[place + 2 :]).items():
        old = re.search(rf"^{key}:.*\n(?:[ \t-].*\n)*", text, re.MULTILINE)
        start, end = old.span() if old is not None else (len(text), len(text))
        text = text[:start] + _line(key, value) + text[end:]
    return text


def _keys() -> set[str]:
    return {field.name for group in GROUPS for field in fields(group)}


def _given(words: list[str]) -> dict[str, object]:
    """The values that a command line gives, with the types of their keys, and no defaults."""
    parser = RecipeParser(GROUPS, allow_abbrev=False)
    namespace, unknown = parser.parse_known_args(words, Namespace(**dict.fromkeys(_keys(), _UNSET)))
    if unknown:
        raise ValueError(unknown_keys(unknown))
    return {key: value for key, value in vars(namespace).items() if value is not _UNSET}


def _line(key: str, value: object) -> str:
    """A line of YAML; whole numbers, which TRL's parser may read as floats, are written as such."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return f"{key}: {text.partition(chr(10))[0]}\n"  # PyYAML ends a document that is a mere value with a line of dots
