"""Holds the walls between the folders of the package (docs/architecture.md) by reading the imports."""

import ast
import sys
from pathlib import Path

import pytest

import transformers_minigpt4


PACKAGE = Path(transformers_minigpt4.__file__).parent
SHIPPED = sorted(path for folder in ("modeling", "processing") for path in (PACKAGE / folder).glob("*_minigpt4.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))
# What a process that loads the remote code has anyway: transformers, torch, and what these install.
OUTSIDE = {"torch", "safetensors", "transformers", "tokenizers", "huggingface_hub", "PIL", "numpy"} | set(
    sys.stdlib_module_names
)


def imports(path: Path) -> list[tuple[int, str, list[str]]]:
    """(level, module, names) of every import of a file, those within functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            found.extend((0, alias.name, []) for alias in node.names)
    return found


def own(path: Path) -> set[str]:
    """Modules of this package that a file imports, with their full names."""
    package = ["transformers_minigpt4", *path.relative_to(PACKAGE).parent.parts]
    names = set()
    for level, module, _ in imports(path):
        if level:
            names.add(".".join([*package[: len(package) - level + 1], *filter(None, [module])]))
        elif module.split(".")[0] == "transformers_minigpt4":
            names.add(module)
    return names


def test_there_is_something_to_check():
    assert len(SHIPPED) >= 6 and len(MODULES) > len(SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_modules_import_their_own_folder_alone(path):
    for level, module, _ in imports(path):
        if level:
            # transformers ships the target of `from .x import y` and of nothing else.
            assert level == 1 and module and "." not in module, f"line `from {'.' * level}{module} import`"
            assert (path.parent / f"{module}.py").exists()
        else:
            assert module.split(".")[0] in OUTSIDE, module


def test_shipped_modules_have_unique_names():
    """They flatten into one folder of a checkpoint."""
    names = [path.name for path in SHIPPED]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_modules_raise_and_do_not_assert(path):
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def test_nothing_imports_the_command_line():
    for path in MODULES:
        if path.name != "cli.py":
            assert not any(name.endswith(".cli") for name in own(path)), path


def test_data_reaches_nothing_but_the_picture_loader():
    allowed = {"transformers_minigpt4.processing.image_utils_minigpt4"}
    for path in (PACKAGE / "data").glob("*.py"):
        foreign = {name for name in own(path) if not name.startswith("transformers_minigpt4.data")}
        assert foreign <= allowed, (path, foreign)


BELOW = {
    "chat": (),
    "hub": ("modeling", "processing"),
    "training": ("modeling", "processing", "data"),
    "data/curation": ("data", "chat", "describe", "web_page", "processing.image_utils_minigpt4"),
    "evaluation": ("data", "chat", "describe", "web_page", "processing.image_utils_minigpt4"),
}
# Where a folder meets what stands beside it.
ALSO = {
    "data/curation/build.py": ("hub",),
    "data/curation/commands.py": ("hub",),
    "evaluation/demo_world.py": ("demo",),
}


@pytest.mark.parametrize("folder", BELOW)
def test_folders_import_what_stands_below_them(folder):
    paths = sorted((PACKAGE / folder).rglob("*.py"))
    assert paths
    for path in paths:
        relative = str(path.relative_to(PACKAGE))
        allowed = (folder.replace("/", "."), *BELOW[folder], *ALSO.get(relative, ()))
        prefixes = tuple(f"transformers_minigpt4.{name}" for name in allowed)
        foreign = {name for name in own(path) if name != "transformers_minigpt4" and not name.startswith(prefixes)}
        assert not foreign, (path, foreign)


def test_the_demo_uses_the_public_names():
    """Those of the package, and the functions of a recipe that docs/training.md shows."""
    for path in (PACKAGE / "demo").glob("*.py"):
        foreign = {name for name in own(path) if not name.startswith("transformers_minigpt4.demo")}
        assert foreign <= {"transformers_minigpt4", "transformers_minigpt4.training.sft"}, (path, foreign)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_public_names_exist():
    for name in transformers_minigpt4.__all__:
        assert getattr(transformers_minigpt4, name).__doc__
