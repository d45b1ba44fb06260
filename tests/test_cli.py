"""Checks the `minigpt4` command: output, exit status, one-line errors, resume, and being stopped or killed."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from PIL import Image
from processes import program
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from transformers_minigpt4 import cli
from transformers_minigpt4.inference.demo_checkpoint import keep_checkpoint
from transformers_minigpt4.processing.pipeline_minigpt4 import DEFAULT_PROMPT
from transformers_minigpt4.utils.files import file_lock


@pytest.fixture(autouse=True)
def loud_libraries():
    """Give the other tests the messages back that the command silences."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)


@pytest.fixture(autouse=True)
def empty_home(tmp_path, monkeypatch) -> Path:
    """A home without a demo checkpoint."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (50, 40), (50 * number, 100, 200)).save(folder / f"{number}.png")
    return folder


def minigpt4(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


class TestOutput:
    def test_one_image_is_plain_text(self, tiny_checkpoint, folder):
        result = minigpt4("describe", folder / "0.png", "--model", tiny_checkpoint, "--max-new-tokens", 10)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.strip() and not result.stdout.startswith("{")
        many = minigpt4("describe", folder, "--model", tiny_checkpoint, "--max-new-tokens", 10)
        assert lines(many.stdout)[0]["caption"] == result.stdout.strip()

    def test_several_images_are_json_lines(self, tiny_checkpoint, folder):
        result = minigpt4("describe", folder, "--model", tiny_checkpoint, "--max-new-tokens", 5, "--prompt", "what?")
        assert (result.exit_code, result.stderr) == (0, "")
        records = lines(result.stdout)
        assert [record["image"] for record in records] == [f"{folder}/{number}.png" for number in range(5)]
        assert all(set(record) == {"image", "caption", "prompt", "model"} for record in records)
        assert {record["prompt"] for record in records} == {"what?"}
        assert {record["model"] for record in records} == {tiny_checkpoint}

    def test_list_on_stdin(self, tiny_checkpoint, folder):
        names = f"{folder}/3.png\n{folder}/1.png\n"
        result = minigpt4("describe", "-", "--model", tiny_checkpoint, "--max-new-tokens", 2, stdin=names)
        assert [record["image"] for record in lines(result.stdout)] == names.split()

    def test_greedy_by_default(self, tiny_checkpoint, folder):
        assert GenerationConfig.from_pretrained(tiny_checkpoint).do_sample
        command = ("describe", folder, "--model", tiny_checkpoint, "--max-new-tokens", 12)
        first, second = minigpt4(*command), minigpt4(*command)
        sampled = minigpt4(*command, "--sample")
        assert first.exit_code == second.exit_code == sampled.exit_code == 0
        assert first.stdout == second.stdout != sampled.stdout

    def test_max_new_tokens(self, tiny_checkpoint, folder):
        short, long = (
            minigpt4("describe", folder / "0.png", "--model", tiny_checkpoint, "--max-new-tokens", n).stdout.strip()
            for n in (3, 20)
        )
        assert long.startswith(short) and len(long) > len(short)

    def test_demo_checkpoint_is_the_default_model(self, tiny_checkpoint, folder, empty_home):
        for _ in range(2):
            keep_checkpoint(Path(tiny_checkpoint))
        kept = empty_home / "minigpt4-demo" / "checkpoint"
        assert list(kept.parent.iterdir()) == [kept]
        assert {path.name for path in kept.iterdir()} == {path.name for path in Path(tiny_checkpoint).iterdir()}
        result = minigpt4("describe", folder / "0.png", folder / "1.png", "--max-new-tokens", 2)
        assert result.exit_code == 0
        assert lines(result.stdout)[0]["model"] == str(kept)
        assert result.stderr.count("the demo's model, which knows drawn shapes only") == 1

    @pytest.mark.parametrize("source", ["python:transformers_minigpt4.demo.run:stage_2_rows", "cc_sbu_align:data"])
    def test_model_of_the_toy_world(self, source, tiny_checkpoint, folder, tmp_path):
        shutil.copytree(tiny_checkpoint, tmp_path / "copy")
        (tmp_path / "copy" / "run.json").write_text(json.dumps({"recipe": {"sources": [source]}}))
        result = minigpt4("describe", folder / "0.png", "--model", tmp_path / "copy", "--max-new-tokens", 2)
        assert ("knows drawn shapes only" in result.stderr) == source.startswith("python")

    def test_default_prompt_is_the_pipelines(self, tiny_checkpoint, folder):
        result = minigpt4("describe", folder, "--model", tiny_checkpoint, "--max-new-tokens", 1)
        assert {record["prompt"] for record in lines(result.stdout)} == {DEFAULT_PROMPT}

    def test_env(self):
        result = minigpt4("env")
        rows = dict(line.split(": ", 1) for line in result.stdout.splitlines())
        assert rows["python"] == sys.version.split()[0]
        assert rows["pillow"] == Image.__version__
        for name in ("transformers_minigpt4", "torch", "transformers", "trl", "peft", "datasets", "accelerate"):
            assert rows[name][0].isdigit()
        assert {"safetensors", "huggingface_hub", "tokenizers", "device", "cpu count", "cuda"} <= set(rows)

    def test_version(self):
        assert minigpt4("--version").stdout[0].isdigit()

    @pytest.mark.parametrize("command", ["demo", "describe", "env"])
    def test_help(self, command):
        result = minigpt4(command, "--help")
        assert result.exit_code == 0 and "Usage" in result.stdout


class TestErrors:
    def one_line(self, *arguments, **options) -> str:
        result = minigpt4(*arguments, **options)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith("minigpt4: ") and result.stderr.count("\n") == 1
        return result.stderr

    def test_bad_image_alone(self, tiny_checkpoint, tmp_path):
        assert "no such file" in self.one_line("describe", tmp_path / "a.png", "--model", tiny_checkpoint)

    def test_bad_image_among_good_ones(self, tiny_checkpoint, folder):
        (folder / "2.png").write_text("not an image")
        result = minigpt4("describe", folder, "--model", tiny_checkpoint, "--max-new-tokens", 2)
        assert result.exit_code == 1
        assert len(lines(result.stdout)) == 4
        assert "2.png" in result.stderr and "4 described, 1 failed" in result.stderr

    def test_demo_has_not_run(self, folder):
        message = self.one_line("describe", folder)
        assert "run `minigpt4 demo`" in message and "or name a checkpoint" in message

    def test_missing_model_folder(self, folder):
        assert "there is no model folder './gone'" in self.one_line("describe", folder, "--model", "./gone")

    def test_folder_that_is_no_model(self, folder, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "cannot load" in self.one_line("describe", folder, "--model", tmp_path / "empty")

    def test_unknown_device(self, folder, tiny_checkpoint):
        assert "cannot use the device 'gpu'" in self.one_line(
            "describe", folder, "--model", tiny_checkpoint, "--device", "gpu"
        )

    def test_folder_without_images(self, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "holds no image" in self.one_line("describe", tmp_path / "empty")

    def test_empty_list(self):
        assert "list of images is empty" in self.one_line("describe", "-", stdin="\n")

    def test_output_of_another_model(self, folder, tiny_checkpoint, tmp_path):
        record = {"image": "a", "caption": "b", "prompt": DEFAULT_PROMPT, "model": "other"}
        (tmp_path / "c.jsonl").write_text(json.dumps(record) + "\n")
        command = ("describe", folder, "--model", tiny_checkpoint, "--output", tmp_path / "c.jsonl")
        assert "was made with model 'other'" in self.one_line(*command)

    def test_unwritable_output(self, folder, tiny_checkpoint, tmp_path):
        (tmp_path / "file").touch()
        command = ("describe", folder, "--model", tiny_checkpoint, "--output", tmp_path / "file" / "c.jsonl")
        assert "is not a folder; choose another --output" in self.one_line(*command)

    def test_output_in_use(self, folder, tiny_checkpoint, tmp_path):
        command = ("describe", folder, "--model", tiny_checkpoint, "--output", tmp_path / "c.jsonl")
        with file_lock(tmp_path / "c.jsonl", ""):
            assert f"another run (process {os.getpid()}) writes to" in self.one_line(*command)

    def test_debug_shows_the_trace(self, folder):
        result = minigpt4("--debug", "describe", folder, "--model", "./gone")
        assert isinstance(result.exception, ValueError) and "./gone" in str(result.exception)

    @pytest.mark.parametrize(
        "arguments",
        [["describe"], ["describe", "a.png", "--batch-size", "0"], ["describe", "a.png", "--dtype", "int8"]],
    )
    def test_usage(self, arguments):
        assert minigpt4(*arguments).exit_code == 2


class TestResume:
    def test_second_run_describes_what_is_missing(self, tiny_checkpoint, folder, tmp_path):
        output = tmp_path / "c.jsonl"
        command = ("describe", folder, "--model", tiny_checkpoint, "--max-new-tokens", 5, "--output", output)
        (folder / "2.png").rename(tmp_path / "good.png")
        (folder / "2.png").write_text("not an image")
        first = minigpt4(*command)
        assert first.exit_code == 1 and first.stdout == "" and "4 described" in first.stderr
        kept = output.read_text()

        again = minigpt4(*command)  # what has been reported is no news
        assert again.exit_code == 0 and f"1 image failed before and still cannot be read, see {output}.failed" in (
            again.stderr
        )
        assert f"all others are in {output} already" in again.stderr and output.read_text() == kept

        (tmp_path / "good.png").replace(folder / "2.png")
        second = minigpt4(*command)
        assert second.exit_code == 0 and "1 described" in second.stderr
        assert output.read_text().startswith(kept)
        assert [Path(record["image"]).name for record in lines(output.read_text())] == [
            f"{number}.png" for number in (0, 1, 3, 4, 2)
        ]

        third = minigpt4(*command)
        assert third.exit_code == 0 and "already" in third.stderr
        assert len(lines(output.read_text())) == 5


class TestProcess:
    """The command as a process of its own."""

    def start(self, *arguments: str | Path, home: Path) -> AbstractContextManager[subprocess.Popen]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "transformers_minigpt4.cli", *(str(argument) for argument in arguments)]
        return program(command, env=environment)

    def stop_midway(self, process: subprocess.Popen, output: Path, by: signal.Signals) -> str:
        """Send a signal when two captions are on disk; returns what the process said on stderr."""
        deadline = time.monotonic() + 120
        while not (output.exists() and output.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(by)
        return process.communicate(timeout=60)[1]

    def test_nothing_but_the_answer_is_printed(self, tiny_checkpoint, folder, tmp_path):
        command = ("describe", folder / "0.png", "--model", tiny_checkpoint, "--max-new-tokens", 10)
        with self.start(*command, home=tmp_path) as process:
            stdout, stderr = process.communicate(timeout=120)
        assert (process.returncode, stderr) == (0, "")
        assert stdout == minigpt4(*command).stdout

    @pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
    def test_interrupt_does_not_wait_for_a_hanging_download(self, tiny_checkpoint, folder, tmp_path):
        with contextlib.ExitStack() as stack:
            silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
            command = ("describe", folder / "0.png", url, "--model", tiny_checkpoint, "--max-new-tokens", 2)
            process = stack.enter_context(self.start(*command, "--batch-size", 1, home=tmp_path))
            assert process.stdout.readline().startswith("{")
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            line = process.communicate(timeout=60)[1]
            assert line.startswith(
                "minigpt4: stopped after 1 of 2 images; nothing can be resumed, `minigpt4 describe "
            )
            assert line.endswith(" --batch-size 1` starts again from the beginning\n")
            assert process.returncode == 130
            assert time.monotonic() - started < 10

    @pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
    @pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
    def test_stopped_midway_and_resumed(self, tiny_checkpoint, folder, tmp_path, by):
        for number in range(5, 12):
            Image.new("RGB", (50, 40), (10 * number, 200, 100)).save(folder / f"{number}.png")
        stopped, complete = tmp_path / "stopped.jsonl", tmp_path / "complete.jsonl"
        command = ("describe", folder, "--model", tiny_checkpoint, "--max-new-tokens", 40, "--batch-size", 2)
        with self.start(*command, "--output", stopped, home=tmp_path) as process:
            stderr = self.stop_midway(process, stopped, by)
        if by == signal.SIGINT:
            assert process.returncode == 130
            assert stderr.startswith("minigpt4: stopped after") and stderr.count("\n") == 1
            assert stderr.endswith(f"`minigpt4 {shlex.join(map(str, [*command, '--output', stopped]))}` resumes\n")
        finished = lines(stopped.read_text(encoding="utf-8"))
        assert 2 <= len(finished) < 12

        with stopped.open("ab") as file:
            file.write(b'{"image": "half a rec')
        assert minigpt4(*command, "--output", stopped).exit_code == 0
        assert minigpt4(*command, "--output", complete).exit_code == 0
        assert stopped.read_bytes() == complete.read_bytes()
