"""
Private names of other packages that the package relies on: each exists, and is listed in docs/architecture.md.

A row here fails when an update takes the name away; `pyproject.toml` keeps such an update out until it was tried.
"""

import importlib
from pathlib import Path

import pytest


ARCHITECTURE = Path(__file__).parent.parent / "docs" / "architecture.md"
SECTION = "## Private names of other packages"

# (module, attributes from it, as they stand in the docs table)
NAMES = [
    ("transformers", "PreTrainedModel._from_config"),
    ("transformers", "PreTrainedModel._auto_class"),
    ("transformers", "ProcessorMixin._auto_class"),
    ("transformers", "PreTrainedConfig._attn_implementation"),
    ("transformers", "Trainer._get_output_dir"),
    ("transformers", "Trainer._save_checkpoint"),
    ("transformers", "Trainer._save"),
    ("transformers", "Trainer._load_from_checkpoint"),
    ("datasets.iterable_dataset", "_BaseExamplesIterable"),
    ("pycocoevalcap.meteor.meteor", "Meteor._stat"),
]


def exists(module: str, name: str) -> bool:
    value = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda value: value)
def test_the_name_exists(module, name):
    assert exists(module, name), f"{module} has no {name} any more: see docs/architecture.md"


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda value: value)
def test_the_name_is_listed(module, name):
    section = ARCHITECTURE.read_text(encoding="utf-8").partition(SECTION)[2].partition("\n## ")[0]
    assert f"`{name}`" in section, f"{name} is missing from the table in docs/architecture.md"
