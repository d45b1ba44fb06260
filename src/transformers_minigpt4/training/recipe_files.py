"""The recipes that come with the package, by name; imports nothing beyond the standard library."""

import os
from importlib.resources import files
from pathlib import Path


RECIPES = files(__package__) / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(Path(str(path)).stem for path in RECIPES.iterdir() if str(path).endswith(".yaml"))


def find_recipe(name: str) -> str:
    """
    The file of a recipe, by path or by the name of one that comes with the package.

    Raises:
        ValueError: for one that does not exist.
    """
    if os.path.isfile(name):
        return name
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"There is no recipe {name}. Give a YAML file, or one of {', '.join(recipe_names())}.")
    return str(path)
