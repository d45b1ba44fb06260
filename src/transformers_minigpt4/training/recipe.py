"""Parses a recipe and the command line that overrides its keys, or writes both as one recipe."""

import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, TrlParser

from .arguments import StageArguments, StageConfig, check_arguments
from .cpu_settings import fit_model
from .recipe_files import find_recipe
from .recipe_keys import ALIASES
from .recipe_values import check_values, keys_of


GROUPS: tuple[Any, ...] = (StageArguments, StageConfig, ModelConfig)  # dataclasses
KEY_TYPES = keys_of(GROUPS)
NAMES = set(KEY_TYPES)
# Keys that had another name before 0.1.0.
RENAMED = {
    "form": "prompt_format",
    "train_parts": "trainable_modules",
    "max_bad_share": "max_error_rate",
    "requires_projection_layers": "requires_projector_layers",
}
_UNSET = object()


class RecipeParser(TrlParser):
    """TRL's parser of recipes and command lines, whose errors are exceptions with one line."""

    def error(self, message: str) -> NoReturn:  # argparse would print all keys and exit
        raise ValueError(f"{message[:1].upper()}{message[1:]}. Correct it in the recipe or on the command line.")


def parse_recipe(arguments: list[str] | None = None) -> tuple[StageArguments, StageConfig, ModelConfig]:
    """
    Reads `--config RECIPE` and the keys that the command line overrides.

    What a machine without a GPU cannot do is changed, and listed in `StageConfig.changes`.

    Dashes and underscores are the same in the names of options, and `--model`, `--output` and `--batch-size` are short
    for `model_name_or_path`, `output_dir` and `per_device_train_batch_size`.

    Args:
        arguments (`list[str]`, *optional*): By default those of the process.

    Raises:
        ValueError: for a recipe or a key that does not exist, a value that its key cannot have, and options that
            exclude each other.
    """
    words = normalize_options(list(sys.argv[1:] if arguments is None else arguments))
    if "--config" in words:
        place = words.index("--config") + 1
        if place == len(words):
            raise ValueError("--config needs a recipe. Give a YAML file, or the name of a recipe of the package.")
        words[place] = find_recipe(words[place])
        check_values(_read(words[place]), KEY_TYPES)
        options = words[: place - 1] + words[place + 1 :]
    else:
        options = words
    _given(options)
    stage, config, model_args, rest = RecipeParser(GROUPS, allow_abbrev=False).parse_args_and_config(
        words, return_remaining_strings=True
    )
    if rest:
        raise ValueError(_unknown_keys(rest))
    if config.use_cpu:
        config.changes += fit_model(model_args, config.without_gpu)
    check_arguments(stage, config, model_args)
    return stage, config, model_args


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
    path = find_recipe(words[place + 1])
    check_values(_read(path), KEY_TYPES)
    text = Path(path).read_text(encoding="utf-8").removesuffix("\n") + "\n"
    for key, value in _given(words[:place] + words[place + 2 :]).items():
        old = re.search(rf"^{key}:.*\n(?:[ \t-].*\n)*", text, re.MULTILINE)
        start, end = old.span() if old is not None else (len(text), len(text))
        text = text[:start] + _line(key, value) + text[end:]
    return text


def _given(options: list[str]) -> dict[str, object]:
    """
    The values of a command line, with the types of their keys, and no defaults.

    Raises:
        ValueError: for a key that does not exist, and a value that its key cannot have.
    """
    unset = Namespace(**dict.fromkeys(NAMES, _UNSET))
    namespace, rest = RecipeParser(GROUPS, allow_abbrev=False).parse_known_args(options, unset)
    if rest:
        raise ValueError(_unknown_keys(rest))
    found = {key: value for key, value in vars(namespace).items() if value is not _UNSET}
    check_values(found, KEY_TYPES)
    return found


def normalize_options(words: list[str]) -> list[str]:
    """
    A command line whose options have the names of their keys: underscores, and no aliases.

    Raises:
        ValueError: for a key that is given under two names with two values.
    """
    found: list[str] = []
    given: dict[str, tuple[str, list[str]]] = {}
    for place, word in enumerate(words):
        if not word.startswith("--"):
            found.append(word)
            continue
        option, equals, value = word[2:].partition("=")
        key = option.replace("-", "_")
        key = ALIASES.get(key, key)
        # TRL's parser reads the file only if it is a word by itself.
        found += ["--config", value] if equals and key == "config" else [f"--{key}{equals}{value}"]
        end = next((i for i, later in enumerate(words) if i > place and later.startswith("--")), len(words))
        values = [value] if equals else words[place + 1 : end]
        earlier, earlier_values = given.setdefault(key, (option, values))
        if earlier != option and earlier_values != values:
            raise ValueError(
                f"--{earlier} {' '.join(earlier_values)} and --{option} {' '.join(values)} set the same key, {key}. "
                "Give one of them."
            )
    if "num_train_epochs" in given and "max_steps" not in given:
        found += ["--max_steps", "-1"]  # a recipe's own would win
    return found


def _line(key: str, value: object) -> str:
    """A line of YAML; whole numbers, which TRL's parser may read as floats, are written as such."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return f"{key}: {text.partition(chr(10))[0]}\n"  # PyYAML ends a document that is a bare value with a line of dots


def _read(path: str) -> Mapping[str, object]:
    """
    The keys and values of a recipe.

    Raises:
        ValueError: for a file that is not YAML, is not a mapping, or has unknown keys.
    """
    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also bytes, dates and depths that cannot be
        raise ValueError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, Mapping):
        raise ValueError(f"The recipe {path} is not a mapping of keys to values.")
    if unknown := [f"--{key}" for key in recipe if key not in NAMES | {"env"}]:
        raise ValueError(_unknown_keys(unknown))
    return recipe


def _unknown_keys(rest: list[str]) -> str:
    """What to say about options that are not keys of recipes."""
    unknown = [word.lstrip("-").partition("=")[0] for word in rest if word.startswith("--")]
    for name in unknown:
        if name in RENAMED:
            return (
                f"The recipe key {name} is called {RENAMED[name]} now. Rename it in the recipe or on the command line."
            )
        if name in ALIASES:
            return f"{name} is an option of the command line only. In a recipe, write {ALIASES[name]}."
    near = get_close_matches(unknown[0].replace("-", "_"), NAMES | ALIASES.keys(), 1) if unknown else []
    return (
        f"Unknown in a recipe or on its command line: {' '.join(rest)}. "
        + (f"Did you mean {near[0]}? " if near else "")
        + "Keys are those of TRL's SFTConfig and ModelConfig, and of this package's training/arguments.py."
    )
