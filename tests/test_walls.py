"""Holds the walls between the folders of the package (docs/architecture.md) by reading the imports."""

import ast
import sys
from pathlib import Path

import pytest

import transformers_minigpt4


PACKAGE = Path(transformers_minigpt4.__file__).parent
SHIPPED = sorted(
    path
    for folder in ("modeling", "processing")
    for name in ("*_minigpt4.py", "*_llava.py")
    for path in (PACKAGE / folder).glob(name)
)
MODULES = sorted(PACKAGE.rglob("*.py"))
# What a process that loads the remote code has anyway: transformers, torch, and what these install.
OUTSIDE = {"torch", "packaging", "safetensors", "transformers", "tokenizers", "huggingface_hub", "PIL", "numpy"} | set(
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
    for level, module, imported in imports(path):
        if level:
            base = ".".join([*package[: len(package) - level + 1], *filter(None, [module])])
            names |= {base} if module else {f"{base}.{name}" for name in imported}
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


# Bottom up. A room imports from lower layers and from itself; rooms of one layer do not know each other.
LAYERS = (
    ("utils",),
    ("modeling", "processing"),
    ("auto",),
    ("data", "llm", "web"),
    ("inference", "conversion"),
    ("hub", "serving"),
    ("bulk",),
    ("training", "curation"),
    ("instruct",),
    ("evaluation",),
    ("demo",),
    ("cli",),
)
LEVELS = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_its_layer():
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} == {*LEVELS, "__init__"}


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent != PACKAGE or path.name != "__init__.py"])
def test_imports_point_downwards(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in own(path):
        # `import transformers_minigpt4` registers the Auto classes and is no room.
        if name != "transformers_minigpt4" and room(name) != here:
            assert room(name) in LEVELS, f"{path} imports {name}, which is no room"
            assert LEVELS[room(name)] < LEVELS[here], f"{path} imports {name} of its own layer or a higher one"


def test_no_modules_import_each_other_in_a_circle():
    modules = {
        ".".join(["transformers_minigpt4", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in MODULES
    }
    graph = {
        name: {other for imported in own(path) for other in modules if other in (imported, f"{imported}.__init__")}
        for name, path in modules.items()
    }
    # Whatever does not import, or is imported by, what is left goes; a circle stays.
    while leaves := {name for name, imported in graph.items() if not imported & graph.keys()}:
        graph = {name: imported for name, imported in graph.items() if name not in leaves}
    assert not graph


# Extras, which may be missing, and what comes with them.
EXTRAS = {
    *("bitsandbytes", "fastapi", "gradio", "lmms_eval", "matplotlib", "openai", "pycocoevalcap", "ray", "spacy"),
    *("starlette", "uvicorn", "vllm"),
}
ONLY_ON_UNIX = {"fcntl", "grp", "posix", "pwd", "resource", "termios", "tty"}


def is_command_module(path: Path) -> bool:
    return path.name in ("cli.py", "command_line.py") or path.name.endswith("commands.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_stand_at_the_top(path):
    """Within functions they save nothing once a command has started: command modules have them there, and extras."""
    functions = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not is_command_module(path):
                module = getattr(node, "module", None) or node.names[0].name
                assert module.split(".")[0] in EXTRAS, f"{path}:{node.lineno} imports {module} in {function.name}"


def test_windows_can_import_every_module():
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                assert not ONLY_ON_UNIX & {alias.name for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in ONLY_ON_UNIX, path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_public_names_exist():
    for name in transformers_minigpt4.__all__:
        assert getattr(transformers_minigpt4, name).__doc__


def test_names_of_test_files_are_unique():
    """Test folders are no packages, so that pytest would mix up two modules of one name."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
