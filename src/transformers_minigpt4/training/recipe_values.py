"""Checks every value of a recipe by the type and the range of its key, before any library sees it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from transformers_minigpt4.utils.json_files import brief

from .recipe_keys import ALIASES


class Range(NamedTuple):
    """The numbers that a key can have: from `low` to `high`, or, without `high`, only those above `low`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (int, float)):
            return False
        return self.low <= value <= self.high and (value > self.low or not self.above)

    def words(self) -> str:
        """What follows "a number" in a message."""
        if self.high != math.inf:
            return f"from {self.low:,} to {self.high:,}"
        return f"above {self.low:g}" if self.above else f"of at least {self.low:g}"


_AT_LEAST_0, _AT_LEAST_1, _ABOVE_0, _SHARE = Range(0), Range(1), Range(0, above=True), Range(0, 1)
_LARGEST_SEED = 2**32 - 1  # NumPy's
RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *(
                "iters_per_epoch",
                "max_completion_length",
                "max_row_length",
                "pack_tokens",
                "requires_projector_layers",
            ),
            *("save_total_limit", "dataloader_prefetch_factor", "lora_r", "lora_alpha"),
        ),
        _AT_LEAST_1,
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "adam_epsilon"), _ABOVE_0),
    **dict.fromkeys(
        (
            *("learning_rate", "min_lr", "warmup_start_lr", "warmup_steps", "weight_decay", "max_grad_norm"),
            *("dataloader_num_workers", "neftune_noise_alpha"),
        ),
        _AT_LEAST_0,
    ),
    **dict.fromkeys(("max_error_rate", "adam_beta1", "adam_beta2", "lora_dropout", "label_smoothing_factor"), _SHARE),
    **dict.fromkeys(("seed", "data_seed"), Range(0, _LARGEST_SEED)),
    "max_steps": Range(-1),  # -1: as many as num_train_epochs takes
}
_WORDS_FOR_TRUTH = ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")  # of TRL's parser
_TEXT_OR_TRUTH = ("resume_from_checkpoint",)  # declared as text


class Key(NamedTuple):
    """What a key's declaration says about its values."""

    name: str
    types: frozenset[Any]
    choices: tuple[str, ...]


def keys_of(groups: tuple[Any, ...]) -> dict[str, Key]:
    """The keys that the fields of dataclasses declare."""
    found = {}
    for group in groups:
        hints = get_type_hints(group)
        for field in fields(group):
            found[field.name] = _key(field, hints[field.name])
    return found


def _key(field: Field[Any], hint: Any) -> Key:
    types = set()
    choices = [str(choice) for choice in field.metadata.get("choices") or ()]
    for kind in _members(hint):
        if get_origin(kind) is Literal:
            choices += map(str, get_args(kind))
            types |= {type(choice) for choice in get_args(kind)}
        elif isinstance(kind, type) and issubclass(kind, Enum):
            choices += [str(member.value) for member in kind]
            types.add(str)
        else:
            types.add(get_origin(kind) or kind)
    if field.name in _TEXT_OR_TRUTH:
        types.add(bool)
    return Key(field.name, frozenset(types), tuple(choices))


def _members(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, UnionType):
        for member in get_args(hint):
            yield from _members(member)
    else:
        yield hint


def check_values(values: Mapping[str, object], keys: Mapping[str, Key]) -> None:
    """
    Checks the values of a recipe, or of a command line.

    Args:
        values: By key; unknown keys are left to others.
        keys: See [`keys_of`].

    Raises:
        ValueError: for the first value that its key cannot have: key, value, and what is allowed.
    """
    for name, value in values.items():
        if name in keys and (allowed := _problem(keys[name], value)) is not None:
            short = {key: f" (--{alias.replace('_', '-')})" for alias, key in ALIASES.items()}.get(name, "")
            raise ValueError(
                f"{name}{short} is {brief(value)}, but must be {allowed}. Correct it in the recipe or on the command "
                "line."
            )


def _problem(key: Key, value: object) -> str | None:
    """What a key allows, if a value is not that."""
    if value is None:
        return None if NoneType in key.types or Any in key.types else _allowed(key)
    if isinstance(value, Enum):
        value = value.value
    if key.choices and str(value) in key.choices and not isinstance(value, bool):
        return None
    if key.choices and key.types <= {str, NoneType}:
        return _allowed(key) + ("; put it in quotes" if isinstance(value, bool) else "")
    for kind in key.types:
        if kind not in _READS or (found := _READS[kind](value)) is None:
            continue
        if not isinstance(found, (int, float)) or isinstance(found, bool):
            return None
        if math.isfinite(found) and (key.name not in RANGES or found in RANGES[key.name]):
            return None
    known = key.types <= _READS.keys() | {NoneType}
    return _allowed(key) if known else None


def _allowed(key: Key) -> str:
    if key.choices:
        return f"one of {', '.join(key.choices)}"
    number = "a whole number" if int in key.types else "a number"
    words = {
        bool: "true or false",
        int: number,
        float: number,
        str: "text",
        list: "a list of texts",
        dict: "a mapping",
    }
    found = list(dict.fromkeys(text for kind, text in words.items() if kind in key.types))
    if key.name in RANGES:
        found = [f"{text} {RANGES[key.name].words()}" if text == number else text for text in found]
    return " or ".join(found) or "a value that the documentation of the key names"


def _number(value: object) -> float | None:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except (ValueError, OverflowError):
            return None
    return None


def _whole(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    return None


def _texts(value: object) -> object:
    is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return value if is_list or isinstance(value, str) else None


def _truth(value: object) -> object:
    return value if isinstance(value, bool) or (isinstance(value, str) and value.lower() in _WORDS_FOR_TRUTH) else None


# For each type, the value as one of it, or nothing.
_READS: dict[Any, Any] = {
    int: _whole,
    float: _number,
    bool: _truth,
    str: lambda value: value if isinstance(value, str) else None,
    list: _texts,
    dict: lambda value: value if isinstance(value, dict) else None,
}
