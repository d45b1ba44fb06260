"""Parses command lines of `minigpt4` without running them, for the tests of help and documentation."""

import shlex
from collections.abc import Iterator
from dataclasses import fields
from unittest.mock import patch

from trl import ModelConfig
from typer.main import get_command

from transformers_minigpt4.cli import app
from transformers_minigpt4.training.arguments import StageArguments, StageConfig
from transformers_minigpt4.training.recipe_keys import ALIASES
from transformers_minigpt4.utils.command_line import Command, Group


KEYS = {field.name for group in (StageArguments, StageConfig, ModelConfig) for field in fields(group)}


def parse(line: str | list[str]) -> dict:
    """
    The arguments of a command line by name, as its command would get them.

    Args:
        line: `minigpt4 …` as a person types it (without pipes and redirections), or its words after `minigpt4`.

    Raises:
        typer.TyperException: for an unknown command, option or value, and for a missing argument.
        ValueError: for an option of `train` or `features` that is not a key of recipes.
    """
    words = shlex.split(line)[1:] if isinstance(line, str) else line
    with patch.object(Command, "invoke", lambda self, context: context):
        context = get_command(app).main(words, prog_name="minigpt4", standalone_mode=False)
    if not hasattr(context, "params"):  # the exit status of --help, --version and the like
        return {}
    for word in context.args:
        key = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and key not in KEYS | ALIASES.keys():
            raise ValueError(f"{word} is not a key of recipes")
    return context.params


def all_commands() -> dict[str, Command | Group]:
    """Every command and group, by what calls it: `"minigpt4"`, `"minigpt4 data"`, `"minigpt4 data check"`."""
    return dict(_below("minigpt4", get_command(app)))


def _below(path: str, command: Command | Group) -> Iterator[tuple[str, Command | Group]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from _below(f"{path} {name}", child)
