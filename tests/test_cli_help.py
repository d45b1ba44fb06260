"""Help of every command: loads no library, has examples that parse, and says the same of the same option."""

import json
import re
import subprocess
import sys

import pytest
from command_lines import all_commands, parse
from typer.core import TyperArgument
from typer.testing import CliRunner

from transformers_minigpt4.cli import MainGroup, app
from transformers_minigpt4.utils.command_line import Command


COMMANDS = all_commands()
LEAVES = {path: command for path, command in COMMANDS.items() if isinstance(command, Command)}
# What differs from command to command: what is written, and what is counted.
OWN_MEANING = {"--model", "--images", "--limit", "--max-new-tokens", "--output"}
HEAVY = {
    *("torch", "transformers", "trl", "peft", "datasets", "accelerate", "huggingface_hub", "numpy", "PIL"),
    *("gradio", "matplotlib", "pydantic", "rich", "yaml"),
}
EVERY_HELP = """
import json, sys
from typer.main import get_command
from typer.testing import CliRunner
from transformers_minigpt4.cli import app

def show(words, command):
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    shown.append(" ".join(words))
    for name, child in getattr(command, "commands", {}).items():
        show([*words, name], child)

shown = []
show([], get_command(app))
assert CliRunner().invoke(app, ["train", "--list-recipes"]).exit_code == 0
json.dump({"shown": shown, "modules": sorted(sys.modules)}, sys.stdout)
"""


def help_of(path: str) -> str:
    result = CliRunner().invoke(app, [*path.split()[1:], "--help"])
    assert result.exit_code == 0, result.output
    return result.output


def test_no_help_loads_a_library():
    done = subprocess.run([sys.executable, "-c", EVERY_HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {f"minigpt4 {words}".strip() for words in found["shown"]} == set(COMMANDS)
    assert not HEAVY & {name.partition(".")[0] for name in found["modules"]}


@pytest.mark.parametrize("path", COMMANDS)
def test_help_ends_with_examples_that_parse(path):
    examples = help_of(path).partition("\nExamples:\n")[2]
    lines = examples.replace("\\\n", "").splitlines()
    assert lines
    for line in lines:
        assert line.startswith("  minigpt4 ")
        parse(line)


@pytest.mark.parametrize("path", LEAVES)
def test_metavars_are_capitals_and_defaults_are_shown(path):
    text = " ".join(help_of(path).split())
    for parameter in LEAVES[path].params:
        assert parameter.help, parameter.name
        if isinstance(parameter, TyperArgument) or not parameter.is_flag:
            assert re.fullmatch(r"[A-Z_,.\[\]]+|\[[\w|-]+\]", parameter.metavar), parameter.metavar
        if parameter.default not in (None, False) and not isinstance(parameter, TyperArgument):
            assert f"[default: {parameter.default}" in text, parameter.name


def test_an_option_reads_the_same_in_every_command():
    found: dict[str, dict[tuple[str | None, str | None], str]] = {}
    for path, command in LEAVES.items():
        for parameter in command.params:
            for name in parameter.opts if not isinstance(parameter, TyperArgument) else ():
                found.setdefault(name, {})[(parameter.help, parameter.metavar)] = path
    differing = {name: list(texts.values()) for name, texts in found.items() if len(texts) > 1}
    assert set(differing) <= OWN_MEANING, differing
    assert all("-" not in name[2:3] and "_" not in name for name in found)


@pytest.mark.parametrize("path", LEAVES)
def test_what_is_written_is_called_output(path):
    names = {name for parameter in LEAVES[path].params for name in parameter.opts}
    assert not names & {"--output-dir", "--sheet", "--png", "--out"}


def test_main_help_lists_every_command_in_a_group():
    listed = [name for names in MainGroup.panels.values() for name in names]
    assert sorted(listed) == sorted(path.split()[1] for path in COMMANDS if path.count(" ") == 1)
    text = help_of("minigpt4")
    places = [text.index(f"\n{title}:\n") for title in ("Use", "Train", "Data", "Evaluate", "Publish")]
    assert places == sorted(places) and "\nCommands:" not in text


@pytest.mark.parametrize("path", [path for path in COMMANDS if path not in LEAVES])
def test_lists_of_commands_cut_no_sentence(path):
    assert "..." not in help_of(path).partition("\nOptions:\n")[2].partition("\nExamples:\n")[0]


def test_underscores_are_dashes_in_names_and_nowhere_else():
    words = ["describe", "a_b.jpg", "--batch_size", "2", "--max_new_tokens=5", "--prompt", "--trust_remote_code"]
    found = parse([*words, "--output=my_file"])
    assert (found["batch_size"], found["max_new_tokens"], found["images"]) == (2, 5, ["a_b.jpg"])
    assert found["prompt"] == "--trust_remote_code" and not found["trust_remote_code"]
    assert found["output"] == "my_file"
    assert parse(["describe", "--trust_remote_code", "--", "--batch_size"])["images"] == ["--batch_size"]
    assert parse("minigpt4 evaluate my_model --batch_size 3 --tasks a_b --data c_d")["tasks"] == ["a_b"]


def test_completion():
    result = CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="minigpt4", env={"SHELL": "/bin/bash"})
    assert result.exit_code == 0 and "complete -o default -F _minigpt4_completion minigpt4" in result.output
    for typed, offered in (
        ("ev", ["evaluate"]),
        ("train tiny", ["tiny", "tiny_stage2"]),
        ("data check --out", ["--output"]),
        ("train tiny --mo", ["--model", "--model-revision"]),
        ("features tiny --feature", ["--feature-cache"]),
        ("train tiny --model ", []),
    ):
        words = f"minigpt4 {typed}"
        request = {"_MINIGPT4_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        result = CliRunner().invoke(app, [], prog_name="minigpt4", env=request)
        assert result.stdout.split() == offered
