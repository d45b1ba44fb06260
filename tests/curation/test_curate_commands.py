"""`minigpt4 curate`: the settings file, what each command says, and one line for what goes wrong."""

import importlib
import json
import os
import shlex
import signal
import sys
import time
from dataclasses import replace

import pytest
from PIL import Image
from processes import program
from scripted_endpoint import Reply, ScriptedEndpoint, user_text
from typer.testing import CliRunner

from transformers_minigpt4.cli import app
from transformers_minigpt4.curation.commands import COMMANDS
from transformers_minigpt4.curation.config import CONFIG_FILE, SETTINGS, CurationConfig
from transformers_minigpt4.curation.store import Project
from transformers_minigpt4.llm.types import ChatSettings
from transformers_minigpt4.utils.files import folder_lock


def minigpt4(*arguments):
    return CliRunner().invoke(app, ["curate", *map(str, arguments)])


def fails(*arguments):
    """The one line that a command says when it fails."""
    result = minigpt4(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


@pytest.fixture
def project(tmp_path, tiny_checkpoint):
    """A project of three images, not run yet; its model writes nonsense."""
    (tmp_path / "images").mkdir()
    for color in ("red", "green", "blue"):
        Image.new("RGB", (60, 60), color).save(tmp_path / "images" / f"{color}.png")
    folder = tmp_path / "project"
    made = minigpt4("init", folder, "--source", tmp_path / "images", "--checkpoint", tiny_checkpoint)
    assert made.exit_code == 0 and f"minigpt4 curate run {folder}" in made.output
    with open(folder / CONFIG_FILE, "a") as file:
        file.write("images: 3\nmax_new_tokens: 4\ncontinue_below: 0\n")
    return folder


def test_every_command_has_help():
    listed = minigpt4("--help").output
    assert list(COMMANDS) == [
        "init",
        "generate",
        "repair",
        "filter",
        "review",
        "build",
        "push",
        "run",
        "status",
        "report",
    ]
    for name in COMMANDS:
        assert name in listed
        assert minigpt4(name, "--help").exit_code == 0


def test_init_writes_every_setting_once(tmp_path):
    arguments = ("--source", "wds:x.tar", "--checkpoint", "a/b", "--images", 50, "--repair-model", "m")
    assert minigpt4("init", tmp_path, *arguments).exit_code == 0
    text = (tmp_path / CONFIG_FILE).read_text()
    expected = CurationConfig("wds:x.tar", "a/b", images=50, repair=ChatSettings("m"))
    assert SETTINGS.read(tmp_path / CONFIG_FILE) == expected
    # With every default uncommented, it is the same configuration.
    whole = "\n".join(line.removeprefix("# ") for line in text.splitlines()[1:])
    (tmp_path / "whole.yaml").write_text(whole)
    assert SETTINGS.read(tmp_path / "whole.yaml") == expected
    assert "already exists; edit it" in fails("init", tmp_path, *arguments)


def test_a_run_without_people(project):
    result = minigpt4("run", project / CONFIG_FILE)
    assert result.exit_code == 0, result.output
    assert "3 images sampled" in result.output and "3 described" in result.output
    assert (project / "report.html").is_file() and not (project / "build").exists()
    png = project / "funnel.png"
    status = minigpt4("status", project, "--output", png)
    assert "sampled" in status.stdout and png.read_bytes().startswith(b"\x89PNG")
    assert minigpt4("report", project, "--output", project / "other.html").stdout.strip().endswith("other.html")
    again = minigpt4("run", project)
    assert "0 described" in again.output and "0 verdicts new or changed" in again.output


def write_good_texts(project):
    """Descriptions that the filter keeps, in place of a model's; what `generate` would do again is not run."""
    text = "A {} square fills the whole picture. Nothing else is in it, and its colour is even from side to side."
    with Project.create(project) as opened:
        from transformers_minigpt4.curation.records import Result
        from transformers_minigpt4.curation.sampling import sample_images

        sample_images(opened, opened.config, False)
        works = list(opened.pending("generate", "by hand"))
        names = [work.pair.origin["key"].removesuffix(".png") for work in works]
        opened.record(
            "generate",
            [Result(w.pair.id, "by hand", w.input, "ok", text=text.format(name)) for w, name in zip(works, names)],
        )


def test_review_by_file_build_and_dry_push(project, tmp_path):
    write_good_texts(project)
    with open(project / CONFIG_FILE, "a") as file:
        file.write("rules: {duplicate_text: false, duplicate_image: false}\n")
    assert minigpt4("filter", project).exit_code == 0
    waiting = tmp_path / "waiting.jsonl"
    assert "3 pending pairs" in minigpt4("review", project, "--export", waiting).output
    assert "reviewers have accepted none" in fails("build", project)
    rows = [json.loads(line) | {"action": "accept"} for line in waiting.read_text().splitlines()]
    rows[0] |= {"action": "edit", "text": "Another text."}
    waiting.write_text("\n".join(map(json.dumps, rows)))
    said = minigpt4("review", project, "--import", waiting, "--reviewer", "anna").output
    assert "3 decisions: 2 accepted, 1 edited, 0 rejected" in said
    assert "3 pairs in" in minigpt4("build", project).output
    pushed = minigpt4("push", project, "me/my-set", "--license", "cc-by-4.0", "--dry-run").output
    assert "would publish the dataset me/my-set" in pushed and "cc-by-4.0" in pushed
    assert "Another text." in (project / "build" / "cc_sbu_align" / "filter_cap.json").read_text()


def test_what_goes_wrong_is_one_line(project, tmp_path):
    assert "holds no curation.sqlite yet" in fails("status", project)
    assert "there is no" in fails("run", tmp_path / "nowhere")
    (tmp_path / "other.yaml").write_text("")
    assert "settings are in a file curation.yaml" in fails("run", tmp_path / "other.yaml")
    assert "no model repairs: set repair_model" in _after_create(project, "repair")
    assert "--export and --import are two steps" in fails("review", project, "--export", "a.csv", "--import", "b.csv")
    assert "has no build yet" in fails("push", project, "me/set")
    settings = (project / CONFIG_FILE).read_text()
    (project / CONFIG_FILE).write_text(f"{settings}rules: {{to_short: false}}")
    assert "no rule 'to_short'" in fails("run", project)
    (project / CONFIG_FILE).write_text(f"{settings}repair_model: m\nrepair_base_url: nowhere")
    assert "base_url is 'nowhere'" in fails("run", project)
    (project / CONFIG_FILE).write_text(settings)
    with Project.open(project) as opened:
        assert not list(opened.pairs())  # told before the first step
    assert "needs --repair-model" in fails("init", tmp_path / "new", *_SOURCE, "--repair-base-url", "http://x/v1")
    (project / CONFIG_FILE).write_text("image: 5")
    assert "unknown keys image" in fails("status", project)


_SOURCE = ("--source", "wds:x.tar", "--checkpoint", "a/b")


def _after_create(project, command):
    with Project.create(project):
        pass
    return fails(command, project)


def test_two_processes_on_one_project(project):
    with Project.create(project), folder_lock(project, "", purpose="repair"):
        for command in ("generate", "filter", "build"):
            assert f"another process works on {project} (repair, process {os.getpid()}), so {command} cannot" in fails(
                command, project
            )


def test_the_endpoint_is_down(project):
    write_good_texts(project)
    config = SETTINGS.read(project / CONFIG_FILE)
    down = replace(config, repair=ChatSettings("m", "http://127.0.0.1:9/v1", max_retries=0))
    (project / CONFIG_FILE).write_text(SETTINGS.text(down))
    assert "127.0.0.1:9" in fails("repair", project)


@pytest.mark.parametrize("command", ["generate", "repair", "filter", "build", "run", "status", "report", "push"])
def test_ctrl_c_names_the_command_that_resumes(project, monkeypatch, command):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    step = "generate" if command == "run" else command
    module, function = {
        "status": ("status", "status_text"),
        "push": ("build", "built_dataset"),
    }.get(step, (step, f"run_{step}"))
    owner = importlib.import_module(f"transformers_minigpt4.curation.{'run' if command == 'run' else module}")
    monkeypatch.setattr(owner, function, stopped)
    with Project.create(project):
        pass
    result = minigpt4(command, project, *["me/set"] * (command == "push"))
    assert result.exit_code == 130
    assert result.stderr == (
        "minigpt4: stopped; everything finished so far is kept, "
        f"`minigpt4 curate {command} {shlex.quote(str(project))}{' me/set' * (command == 'push')}` resumes\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_does_not_wait_for_a_slow_endpoint(project):
    write_good_texts(project)
    with ScriptedEndpoint([Reply(delay=60)]) as endpoint:
        slow = replace(SETTINGS.read(project / CONFIG_FILE), repair=ChatSettings("m", endpoint.base_url))
        (project / CONFIG_FILE).write_text(SETTINGS.text(slow))
        command = [sys.executable, "-m", "transformers_minigpt4.cli", "curate", "repair", str(project)]
        with program(command) as process:
            deadline = time.monotonic() + 120
            while not endpoint.requests and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
            assert time.monotonic() - started < 30
    assert process.returncode == 130
    assert stderr.endswith(f"`minigpt4 curate repair {project}` resumes\n") and stderr.count("\n") == 1


def test_a_repair_without_any_result_is_a_failure(project):
    write_good_texts(project)
    with ScriptedEndpoint([Reply(status=400)]) as endpoint:
        refusing = replace(SETTINGS.read(project / CONFIG_FILE), repair=ChatSettings("m", endpoint.base_url))
        (project / CONFIG_FILE).write_text(SETTINGS.text(refusing))
        result = minigpt4("repair", project)
        assert result.exit_code == 1
        assert "3  refused, such as: http://127.0.0.1" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("minigpt4: the repair failed for all 3 texts")
        endpoint.respond = lambda body: Reply(status=400) if "red" in user_text(body) else user_text(body)
        assert minigpt4("repair", project).exit_code == 0
