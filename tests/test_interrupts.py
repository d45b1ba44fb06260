"""Sends Ctrl-C to `minigpt4` commands: one line, with the command that resumes or starts anew, and exit status 130."""

import os
import signal
import subprocess
import sys

import pytest
from processes import program


COMMAND = [sys.executable, "-m", "transformers_minigpt4.cli"]


def interrupted(process: subprocess.Popen) -> str:
    """Sends SIGINT to a command; returns the one line that it ends with."""
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    *before, last = stderr.splitlines()
    assert process.returncode == 130, stderr
    assert last.startswith("minigpt4: stopped") and not any("Traceback" in line for line in before), stderr
    return last


@pytest.mark.parametrize("module", ["wrapt.arguments", "typer.core", "transformers.utils.logging", "torch.fx.node"])
def test_while_importing(module, tmp_path):
    words = ["demo", "--output", str(tmp_path / "my demo")]
    with program([sys.executable, "-X", "importtime", *COMMAND[1:], *words]) as process:
        assert any(line.rpartition("|")[2].strip() == module for line in process.stderr)
        line = interrupted(process)
    assert f"`minigpt4 demo --output '{tmp_path}/my demo'` starts" in line


def test_while_training(tmp_path):
    words = ["demo", "--output", str(tmp_path / "demo")]
    with program([*COMMAND, *words], env={**os.environ, "HF_HOME": str(tmp_path / "home")}) as process:
        assert any(line.startswith("stage 1: step") for line in process.stdout)
        line = interrupted(process)
    command = f"`minigpt4 demo --output {tmp_path}/demo`"
    assert line == f"minigpt4: stopped; nothing can be resumed, {command} starts again from the beginning"
    assert not (tmp_path / "home").exists() and not list((tmp_path / "demo").glob(".*"))
