"""Settings from files and command lines against the types of a dataclass."""

from dataclasses import dataclass, field

import pytest

from transformers_minigpt4.utils.settings import field_values


@dataclass
class Settings:
    count: int
    share: float | None = None
    name: str = ""
    on: bool = False
    rules: dict[str, object] = field(default_factory=dict)


def test_values_of_the_right_types_pass():
    given = {"x_count": 3, "x_share": 1, "x_on": True, "x_rules": {"a": 1}, "count": "of somebody else"}
    values = field_values(Settings, given, "x_")
    assert values == {"count": 3, "share": 1.0, "on": True, "rules": {"a": 1}}
    assert type(values["share"]) is float  # 1 and 1.0 are one setting
    assert field_values(Settings, {"share": None}) == {"share": None}


@pytest.mark.parametrize(
    "name,value,kind",
    [
        ("count", "3", "int"),
        ("count", 3.0, "int"),
        ("count", True, "int"),
        ("count", None, "int"),
        ("share", True, "float"),
        ("share", "1e-3", "float"),
        ("name", False, "str"),
        ("on", 1, "bool"),
        ("rules", [], "dict"),
    ],
)
def test_values_of_other_types_are_refused(name, value, kind):
    with pytest.raises(ValueError, match=rf"^{name} is .*, but must be of type {kind}$"):
        field_values(Settings, {name: value})
