"""README and docs: their links lead somewhere, their commands exist, their Python runs and prints what they say."""

import ast
import importlib
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from command_lines import parse
from trl import SFTConfig

from transformers_minigpt4.evaluation.tasks.advanced import CRITERIA
from transformers_minigpt4.training.arguments import StageArguments, StageConfig
from transformers_minigpt4.training.recipe_files import recipe_names


ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)```", re.DOTALL)


def blocks(page: Path, language: str) -> list[re.Match]:
    return [match for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if match["language"] == language]


def test_the_two_commands_of_the_readme():
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block["body"].splitlines()]
    assert "pip install -c constraints.txt . && minigpt4 demo" in lines
    assert 'pip install -c constraints.txt ".[test]" && pytest' in lines  # .ci/run runs this very line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def resolve(name: str) -> object:
    """The object that a dotted name means; fails where a module or attribute of it does not exist."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def imported_names(code: str) -> list[str]:
    """The names that a code block imports from this package."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers_minigpt4":
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_exist(page):
    """Of API pages, and of the imports in code blocks that are not run."""
    names = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for match in blocks(page, "python"):
        names += imported_names(match["body"])
    for name in names:
        assert resolve(name) is not None, name


def test_pages_that_the_code_names_exist():
    for path in (ROOT / "src").rglob("*"):
        if path.suffix in (".py", ".yaml", ".jinja"):
            for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8")):
                assert (ROOT / name).is_file(), f"{path.name} names {name}"


def test_the_page_of_recipe_keys_is_complete():
    page = (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")
    inherited = {field.name for field in fields(SFTConfig)}
    own = {field.name for group in (StageArguments, StageConfig) for field in fields(group)} - inherited
    assert [name for name in sorted(own) if f"| `{name}` |" not in page] == []
    assert [name for name in recipe_names() if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:examples|benchmarks|tests|docs)/[\w/-]+\.(?:py|ipynb|md|png)\b", text):
        assert any((ROOT / base / name).is_file() for base in ("", "docs")), name
    for name in re.findall(r"`((?:modeling|processing|training|conversion|curation|utils)/\w+\.py)`", text):
        assert (ROOT / "src" / "transformers_minigpt4" / name).is_file(), name


# British spellings, and words for which the package has others: image, projector, dataset, resume, complete.
OTHER_WORDS = re.compile(
    r"\b(pictures?|projections?|data sets?|licences?|colours?|neighbours?|(?:tokenis|normalis|quantis)\w*|learnt"
    r"|shortcuts?|whole|goes on|on end|at hand)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda p: p.name)
def test_words(page):
    """Code, prompts and quoted output stay as they are."""
    text = re.sub(r"```.*?```|`[^`]*`|^::: .*$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for criterion in CRITERIA.values():
        text = text.replace(criterion, "")
    assert OTHER_WORDS.findall(text) == []


def test_every_page_is_on_the_site():
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert listed == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in re.sub(r"\\\n\s*", "", block["body"]).splitlines():
                for command in re.split(r"&&|\||;", line.split(" #")[0]):
                    if command.strip().startswith("minigpt4 "):
                        found.append((page.name, command.strip()))
    return found


@pytest.mark.parametrize("page,command", commands())
def test_commands_exist_with_their_options(page, command):
    """Parses each `minigpt4 …` as the program would, without running it."""
    parse(re.split(r"[<>]", command)[0])


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_python_runs_and_prints_what_the_page_says(name, demo_run):
    """One process per page, in the folder where the demo has left `minigpt4-demo`."""
    page = ROOT / name
    code = "\n".join(match["body"] for match in blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=demo_run.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [match["body"] for match in blocks(page, "text") if match["mark"] == "printed"]
    # The answers' facts; how a description goes on may turn on the last digit of a weight.
    expected = [facts(line) for body in printed for line in body.splitlines()]
    assert [facts(line) for line in done.stdout.splitlines()[: len(expected)]] == expected


def facts(line: str) -> list[str]:
    return line.split(". ")[:2]
