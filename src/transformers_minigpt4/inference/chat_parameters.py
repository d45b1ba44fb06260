"""The settings of a conversation's answers, and what they can be."""

from collections.abc import Mapping
from typing import NamedTuple


# No penalty either: it changes which token is the likeliest.
GREEDY: Mapping[str, object] = {"do_sample": False, "repetition_penalty": 1.0}


class _Range(NamedTuple):
    kind: type
    least: float
    most: float = float("inf")
    above: bool = False  # whether `least` itself is too small


_RANGES = {
    "do_sample": _Range(bool, 0, 1),
    "temperature": _Range(float, 0, above=True),
    "top_p": _Range(float, 0, 1, above=True),
    "top_k": _Range(int, 0),
    "repetition_penalty": _Range(float, 0, above=True),
    "max_new_tokens": _Range(int, 1),
    "min_new_tokens": _Range(int, 0),
}
_SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def check_parameters(parameters: Mapping[str, object]) -> dict[str, object]:
    """
    The parameters, each of its type; texts such as `"0.7"` and `"true"` are read.

    Raises:
        ValueError: for an unknown name, or a value that it cannot have.
    """
    return {name: _checked(name, value) for name, value in parameters.items()}


def _checked(name: str, value: object) -> object:
    if name not in _RANGES:
        raise ValueError(f"there is no parameter {name!r}; there are {', '.join(_RANGES)}")
    kind, least, most, above = _RANGES[name]
    wanted = "true or false"
    if kind is bool:
        switched = value if isinstance(value, bool) else _SWITCH.get(str(value).lower())
        if switched is not None:
            return switched
    else:
        number = "a number" if kind is float else "an integer"
        limit = f"above {least:g}" if above else f"from {least:g}"
        wanted = f"{number} {limit}" + ("" if most == float("inf") else f" to {most:g}")
        try:
            found = kind(value) if isinstance(value, (str, int, kind)) and not isinstance(value, bool) else None
        except ValueError:
            found = None
        if found is not None and least <= found <= most and found < float("inf") and not (above and found == least):
            return found
    raise ValueError(f"{name} cannot be {value!r}; it is {wanted}")
