"""Checks of settings that come from a file or a command line against the types of a dataclass's fields."""

from collections.abc import Mapping
from dataclasses import Field, fields
from types import UnionType
from typing import Any, ClassVar, Protocol, get_origin


class Dataclass(Protocol):
    """Any class that `dataclasses.dataclass` has made."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def field_names(settings: type[Dataclass], prefix: str = "") -> list[str]:
    """The names of a dataclass's fields among flat settings."""
    return [prefix + field.name for field in fields(settings)]


def field_values(settings: type[Dataclass], values: Mapping[str, object], prefix: str = "") -> dict[str, Any]:
    """
    Keyword arguments for a dataclass, taken from flat settings.

    Args:
        settings (`type`): A dataclass whose fields have plain types, such as `int` or `str | None`.
        values (`Mapping`): Settings by name; those that are not fields of the dataclass are ignored.
        prefix (`str`, *optional*): Precedes the field's name in `values`.

    Raises:
        ValueError: for a value of another type; the message begins with its name. Whole numbers pass as `float`.
    """
    return {
        field.name: _checked(prefix + field.name, values[prefix + field.name], field.type)
        for field in fields(settings)
        if prefix + field.name in values
    }


def _checked(name: str, value: object, kind: Any) -> object:
    """YAML reads `1e-3` as text and `no` as false."""
    origin = get_origin(kind)
    kind = kind if origin in (None, UnionType) else origin  # `dict[str, int]` is checked as `dict`
    if value is None and isinstance(None, kind):
        return None
    whole = type(value) is int and isinstance(1.0, kind)
    if not (whole or isinstance(value, kind)) or (isinstance(value, bool) and kind is not bool):
        wanted = str(kind).replace(" | None", "") if isinstance(kind, UnionType) else kind.__name__
        raise ValueError(f"{name} is {value!r:.80}, but must be of type {wanted}")
    return float(value) if type(value) is int and whole else value  # 0 and 0.0 are one setting, for digests too
