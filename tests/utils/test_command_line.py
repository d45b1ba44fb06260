"""What all commands share: one line for an error, a status for Ctrl-C, options and help."""

import errno
import sqlite3

import pytest
import typer
from typer.testing import CliRunner, Result

from transformers_minigpt4.utils import command_line
from transformers_minigpt4.utils.command_line import BatchSize, Command, Group, interruptible, this_command
from transformers_minigpt4.utils.files import InUseError


@pytest.fixture(autouse=True)
def nothing_to_quieten(monkeypatch):
    monkeypatch.setattr(command_line, "quieten_libraries", lambda debug: None)


def run(function, *words: str, debug: bool = False) -> Result:
    app = typer.Typer(cls=Group, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)

    @app.callback()
    def options(context: typer.Context) -> None:
        context.obj = debug

    app.command("go", cls=Command)(function)
    return CliRunner().invoke(app, ["go", *words])


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(2, "No such file", "a.txt"), "a.txt: No such file"),
        (FileExistsError("a exists. Name another."), "a exists. Name another."),
        (InUseError("Another run writes into a."), "Another run writes into a."),
        (KeyError("a"), "KeyError: 'a' (`minigpt4 --debug ...` shows the trace)"),
        (OutOfMemoryError("tried to allocate"), "the device is out of memory; lower --batch-size"),
        (OSError(errno.ENOSPC, "No space left on device", "a.txt"), "a.txt: no space is left on the disk; free some"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left on the disk; free some"),
        (sqlite3.OperationalError("database or disk is full"), "no space is left on the disk"),
        (OSError("checkpoint-4 could not be written (No space left on device). Free it."), "checkpoint-4 could not"),
    ],
)
def test_an_error_is_one_line(error, line):
    def fail() -> None:
        raise error

    result = run(fail)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"minigpt4: {line}") and result.stderr.count("\n") == 1
    assert run(fail, debug=True).exception is error


def test_usage_errors_are_typers():
    def refuse() -> None:
        raise typer.BadParameter("not this one")

    assert run(refuse).exit_code == 2 and "not this one" in run(refuse).stderr
    assert run(lambda: None, "--unknown").exit_code == 2


@pytest.mark.parametrize("message", ["stopped", lambda: "stopped"])
def test_ctrl_c(message):
    def stop() -> None:
        with interruptible(message):
            raise KeyboardInterrupt

    result = run(stop)
    assert (result.exit_code, result.stderr) == (130, "minigpt4: stopped\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt, None])
def test_ctrl_c_outside_of_such_a_block(error):
    def stop(name: str, number: int = 1) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            # A library that is being imported may turn it into an error.
            raise error or ImportError("half a module") from interrupt

    result = run(stop, "a b", "--number=3")
    line = "stopped; nothing can be resumed, `minigpt4 go 'a b' --number=3` starts again from the beginning"
    assert (result.exit_code, result.stderr) == (130, f"minigpt4: {line}\n")


@pytest.mark.parametrize(
    "given", [[], ["--resume-from", "false"], ["--resume_from=false"], ["--resume-from", "false", "--resume-from=x"]]
)
def test_this_command_with_another_value(given):
    def show(resume_from: str = "", name: str = "") -> None:
        typer.echo(this_command("--resume-from", "true"))
        typer.echo(this_command())

    changed, as_typed = run(show, *given, "--name", "b c").stdout.splitlines()
    assert changed == "minigpt4 go --name 'b c' --resume-from true"
    assert as_typed == " ".join(["minigpt4 go", *given, "--name 'b c'"])


def test_help():
    def describe(
        sizes: list[int], batch_size: BatchSize = 8, name: str = "a", fast: bool = False, ratio: float | None = None
    ) -> None:
        """
        Describe.

        Examples:
            minigpt4 go 1 \\
                2
        """

    lines = run(describe, "--help").stdout.splitlines()
    assert lines[0].endswith(" go SIZES [OPTIONS]")
    assert lines[-3:] == ["Examples:", "  minigpt4 go 1 \\", "      2"]
    options = [line.strip().split("  ")[0] for line in lines if line.startswith("  --")]
    assert options == ["--batch-size NUMBER", "--name TEXT", "--fast / --no-fast", "--ratio NUMBER", "--help"]
