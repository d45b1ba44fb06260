"""Publishing over the wire to a small Hub on loopback: all or nothing on main, faults, secrets, and loading back."""

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from hub_server import TOKEN, Blob, Fault, HubServer
from PIL import Image
from processes import program
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from transformers_minigpt4.hub import upload
from transformers_minigpt4.hub.cards import License
from transformers_minigpt4.hub.commands import push
from transformers_minigpt4.hub.publish import prepare, push_to_hub
from transformers_minigpt4.hub.records import public_name, public_source
from transformers_minigpt4.hub.upload import publish


MIT = License("mit")
REPO = "somebody/tiny-minigpt4"
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, *args):
        if name.split(".")[0] == "transformers_minigpt4":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

# As `minigpt4` runs a subcommand: an interrupted one does not wait for threads.
COMMAND = """
import os, sys, typer
from transformers_minigpt4.hub.commands import push
try:
    typer.run(push)
except SystemExit as end:
    sys.stderr.flush()
    os._exit(end.code)
"""


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(upload, "FIRST_WAIT", 0.01)
    with HubServer() as server:
        constants = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        constants["HUGGINGFACE_CO_URL_TEMPLATE"] = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once, for the Hub of that moment
        yield server


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def environment(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    """For a process of its own that knows this Hub alone, and nobody's token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **own, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", **more}


def run_elsewhere(script: str, hub: HubServer, folder: Path, *arguments: str, block: bool = True) -> str:
    """Runs a script without this package, in `folder`; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCK * block + script, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(hub, folder / "home"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def minigpt4_push(*arguments: str | Path):
    app = typer.Typer()
    app.command()(push)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def contents(hub: HubServer, repo_id: str = REPO, kind: str = "models") -> dict[str, bytes]:
    return {name: blob.content for name, blob in hub.main(repo_id, kind).items()}


class TestLoading:
    SCRIPT = """
import json
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.pipelines import get_task

repo = sys.argv[1]
trust = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(repo, **trust)
processor = AutoProcessor.from_pretrained(repo, **trust)
prompt = "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: "
inputs = processor(images=Image.open("image.jpg"), text=prompt, return_tensors="pt")
greedy = json.loads(sys.argv[2])
pipe = pipeline(sys.argv[3] or get_task(repo), model=repo, **trust)
result = {"ids": model.generate(**inputs, **greedy).tolist(), "task": pipe.task, "pipe": type(pipe).__name__}
result["text"] = pipe("image.jpg", generate_kwargs=greedy)
print("RESULT" + json.dumps(result))
"""

    def load(self, hub, folder, repo_id, task: str = "") -> dict:
        """`task` is read from the repository's metadata where none is given."""
        Image.new("RGB", (90, 60), (200, 30, 30)).save(folder / "image.jpg")
        printed = run_elsewhere(self.SCRIPT, hub, folder, repo_id, json.dumps(GREEDY), task)
        return json.loads(next(line for line in printed.splitlines() if line.startswith("RESULT"))[6:])

    def expected(self, checkpoint, folder) -> list:
        processor = AutoProcessor.from_pretrained(checkpoint)
        model = AutoModelForImageTextToText.from_pretrained(checkpoint)
        prompt = "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: "
        inputs = processor(images=Image.open(folder / "image.jpg"), text=prompt, return_tensors="pt")
        return model.generate(**inputs, **GREEDY).tolist()

    def test_from_pretrained_without_this_package(self, hub, checkpoint, tmp_path):
        push_to_hub(checkpoint, REPO, license=MIT)
        result = self.load(hub, tmp_path, REPO)
        assert result["ids"] == self.expected(checkpoint, tmp_path)
        assert result["task"] == "image-text-to-text" and result["pipe"] == "MiniGPT4ImageToTextPipeline"
        assert result["text"][0]["generated_text"]

    def test_the_code_of_the_card_runs(self, hub, checkpoint, tmp_path):
        push_to_hub(checkpoint, REPO, license=MIT)
        Image.new("RGB", (90, 60), (200, 30, 30)).save(tmp_path / "image.jpg")
        card = contents(hub)["README.md"].decode()
        blocks = [part.split("```")[0] for part in card.split("```python\n")[1:]]
        assert len(blocks) == 2
        for block in blocks:
            assert run_elsewhere(block, hub, tmp_path).strip()

    def test_trained_modules_and_their_base(self, hub, checkpoint, tmp_path, processor):
        model = AutoModelForImageTextToText.from_pretrained(checkpoint).requires_grad_(False)
        projector = model.model.multi_modal_projector.requires_grad_(True)
        with torch.no_grad():
            for parameter in projector.parameters():
                parameter.add_(0.05)
        trained = tmp_path / "trained"
        model.save_pretrained(trained, trained_only=True)
        processor.save_pretrained(trained)
        before = (trained / "config.json").read_bytes()
        with pytest.raises(ValueError, match="is a folder on this computer"):
            push_to_hub(trained, "somebody/trained", license=MIT)
        base = push_to_hub(checkpoint, REPO, license=MIT)
        push_to_hub(trained, "somebody/trained", license=MIT, base=f"{REPO}@{base.commit}")

        assert (trained / "config.json").read_bytes() == before
        (record,) = json.loads(contents(hub, "somebody/trained")["config.json"])["base_checkpoints"]
        assert (record["name_or_path"], record["revision"]) == (REPO, base.commit)
        card = contents(hub, "somebody/trained")["README.md"].decode()
        assert f"base_model:\n- {REPO}\n" in card and "base_model_relation: adapter" in card
        assert "only the trained modules" in card
        assert str(tmp_path) not in card
        shutil.rmtree(checkpoint)  # nothing may come from here
        assert self.load(hub, tmp_path, "somebody/trained")["ids"] == model.generate(
            **processor(
                images=Image.open(tmp_path / "image.jpg"),
                text="###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: ",
                return_tensors="pt",
            ),
            **GREEDY,
        ).tolist()  # fmt: skip

    def test_transformers_own_push_to_hub(self, hub, checkpoint, tmp_path):
        model = AutoModelForImageTextToText.from_pretrained(checkpoint)
        model.push_to_hub(REPO)
        AutoProcessor.from_pretrained(checkpoint).push_to_hub(REPO)
        assert {"config.json", "model.safetensors", "modeling_minigpt4.py"} <= set(contents(hub))
        result = self.load(hub, tmp_path, REPO, task="image-to-text")
        assert result["ids"] == self.expected(checkpoint, tmp_path)

    def test_a_base_recorded_under_the_old_key_is_noticed(self, checkpoint, tmp_path, processor):
        model = AutoModelForImageTextToText.from_pretrained(checkpoint).requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        model.save_pretrained(tmp_path / "trained", trained_only=True)
        config = json.loads((tmp_path / "trained" / "config.json").read_text())
        config["base_parts"] = config.pop("base_checkpoints")
        (tmp_path / "trained" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="is a folder on this computer"):
            prepare(tmp_path / "trained", REPO, tmp_path, license=MIT)

    def test_trained_modules_record_the_commit_of_their_base(self, hub, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        AutoModelForImageTextToText.from_pretrained(checkpoint).push_to_hub(REPO)
        model = AutoModelForImageTextToText.from_pretrained(REPO, cache_dir=tmp_path / "cache").requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        model.save_pretrained(tmp_path / "trained", trained_only=True)
        (record,) = json.loads((tmp_path / "trained" / "config.json").read_text())["base_checkpoints"]
        assert record["name_or_path"] == REPO and re.fullmatch("[0-9a-f]{40}", record["revision"])


FAULTS = [
    ("POST", "/repos/create", "500"),
    ("POST", "/repos/create", "lost"),
    ("POST", "/validate-yaml", "html"),
    ("GET", f"/models/{REPO}", "hang"),
    ("POST", "/preupload/", "500"),
    ("POST", "/objects/batch", "hang"),
    ("PUT", "/lfs/", "500"),
    ("PUT", "/lfs/", "cut"),
    ("PUT", "/lfs/", "hang"),
    ("PUT", "/lfs/", "lost"),
    ("POST", "/commit/", "500"),
    ("POST", "/commit/", "hang"),
    ("POST", "/commit/", "cut"),
    ("POST", "/commit/", "lost"),
]


class TestFaults:
    @pytest.mark.parametrize(("method", "path", "kind"), FAULTS, ids=lambda value: value.strip("/").replace("/", "-"))
    def test_one_fault_is_got_over(self, hub, checkpoint, tmp_path, method, path, kind):
        publication = prepare(checkpoint, REPO, tmp_path, license=MIT)
        hub.faults.append(fault := Fault(method, path, kind))
        started = time.monotonic()
        publish(publication, timeout=0.5)
        assert time.monotonic() - started < 15  # a server that hangs does so for 20 s
        assert fault.times == 0
        everything = {name: publication.read(name) for name in publication.files}
        assert contents(hub) == everything
        assert set(hub.states) <= {frozenset(), frozenset(everything)}
        # The bytes of the weights arrive once, unless nobody hears that they did.
        assert len(hub.uploads) == (2 if (method, kind) == ("PUT", "lost") else 1)
        assert len(hub.repositories["models", REPO].messages) == 2  # the repository's first commit and ours

    def test_giving_up_and_going_on(self, hub, checkpoint, monkeypatch):
        monkeypatch.setattr(upload, "TRIES", 2)
        hub.faults.append(Fault("POST", "/commit/", "500", times=2))
        with pytest.raises(OSError, match=r"gave up after 2 tries .*500.* run the command again to resume"):
            push_to_hub(checkpoint, REPO, license=MIT)
        assert contents(hub) == {} and len(hub.uploads) == 1
        push_to_hub(checkpoint, REPO, license=MIT)
        assert "model.safetensors" in contents(hub) and len(hub.uploads) == 1

    @pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
    @pytest.mark.parametrize("by", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
    def test_stopped_in_the_middle(self, hub, checkpoint, tmp_path, by):
        """Two weight files; the process ends after the first has arrived."""
        save_file({"another": torch.ones(300, 300)}, checkpoint / "another.safetensors")
        hub.faults.append(Fault("PUT", "/lfs/", lambda: None))
        hub.faults.append(Fault("PUT", "/lfs/", "hang"))
        command = [sys.executable, "-c", COMMAND, str(checkpoint), REPO, "--license", "mit"]
        with program(command, env=environment(hub, tmp_path / "home", HF_TOKEN=TOKEN)) as process:
            deadline = time.monotonic() + 60
            while not (hub.uploads and sum(method == "PUT" for method, _ in hub.requests) == 2):
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(by)
            stderr = process.communicate(timeout=60)[1]
        if by == signal.SIGINT:
            assert process.returncode == 130 and "stopped before anything became visible; `" in stderr
        assert contents(hub) == {} and len(hub.uploads) == 1
        push_to_hub(checkpoint, REPO, license=MIT)
        assert {"model.safetensors", "another.safetensors"} <= set(contents(hub))
        assert len(hub.uploads) == len(set(hub.uploads)) == 2

    def test_a_commit_in_between_is_kept(self, hub, checkpoint):
        repository = hub.create("models", REPO)
        files = {**repository.files("main"), "notes.md": Blob(b"theirs", False)}
        hub.faults.append(Fault("POST", "/preupload/", lambda: hub.commit(repository, "main", files, "theirs")))
        push_to_hub(checkpoint, REPO, license=MIT)
        assert {"notes.md", "model.safetensors"} <= set(contents(hub))
        assert repository.messages[1] == "theirs"
        assert sum("/commit/" in path for _, path in hub.requests) == 2  # the first was refused

    def test_offline(self, hub, checkpoint, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
            push_to_hub(checkpoint, REPO, license=MIT)
        assert hub.repositories == {}

    def test_without_a_token(self, hub, checkpoint):
        with pytest.raises(OSError, match="hf auth login"):
            push_to_hub(checkpoint, REPO, license=MIT, token="hf_wrongwrongwrongwrong")


class TestRepository:
    def test_second_push_sends_nothing(self, hub, checkpoint):
        first = push_to_hub(checkpoint, REPO, license=MIT)
        second = push_to_hub(checkpoint, REPO, license=MIT)
        assert second.commit == first.commit and len(hub.uploads) == 1
        assert sum("/commit/" in path for _, path in hub.requests) == 1

    def test_new_weights_replace_old_shards_in_one_commit(self, hub, checkpoint):
        tensors = load_file(checkpoint / "model.safetensors")
        model = AutoModelForImageTextToText.from_pretrained(checkpoint)
        (checkpoint / "model.safetensors").unlink()
        model.save_pretrained(checkpoint, max_shard_size="500KB")
        assert (checkpoint / "model.safetensors.index.json").is_file()
        push_to_hub(checkpoint, REPO, license=MIT)
        old = frozenset(contents(hub))
        repository = hub.repositories["models", REPO]
        hub.commit(repository, "main", {**repository.files("main"), "image.png": Blob(b"", False)}, "an image")

        for shard in checkpoint.glob("model*safetensors*"):
            shard.unlink()
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
        hub.states.clear()
        published = push_to_hub(checkpoint, REPO, license=MIT)
        assert set(published.removed) == {name for name in old if name.startswith("model-") or "index" in name}
        new = frozenset(contents(hub))
        assert "image.png" in new and not any(name.startswith("model-") for name in new)
        assert set(hub.states) <= {old | {"image.png"}, new}

    def test_branch(self, hub, checkpoint):
        push_to_hub(checkpoint, REPO, license=MIT, revision="v1", commit_message="First")
        repository = hub.repositories["models", REPO]
        assert "model.safetensors" in repository.files("v1") and repository.messages[-1] == "First"
        assert contents(hub) == {}
        push_to_hub(checkpoint, REPO, license=MIT, revision="v1")
        assert sum("/commit/" in path for _, path in hub.requests) == 1

    def test_private(self, hub, checkpoint):
        push_to_hub(checkpoint, REPO, license=MIT, private=True)
        assert hub.repositories["models", REPO].private
        push_to_hub(checkpoint, REPO, license=MIT, private=True)

    def test_a_public_repository_is_no_private_one(self, hub, checkpoint):
        push_to_hub(checkpoint, REPO, license=MIT)
        (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + "\n")
        with pytest.raises(ValueError, match="exists and is public"):
            push_to_hub(checkpoint, REPO, license=MIT, private=True)
        assert sum("/commit/" in path for _, path in hub.requests) == 1


class TestSecrets:
    def test_the_token_appears_nowhere(self, hub, checkpoint, tmp_path, caplog, capfd, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_DEBUG", True)
        library = logging.getLogger("huggingface_hub")
        monkeypatch.setattr(library, "propagate", True)
        caplog.set_level(logging.DEBUG)
        caplog.set_level(logging.DEBUG, logger="huggingface_hub")
        hub.faults.append(Fault("POST", "/commit/", "500"))
        push_to_hub(checkpoint, REPO, license=MIT)
        logged = caplog.text
        assert "/commit/" in logged and "500" in logged  # the libraries did log their requests
        caplog.clear()

        # A server that sends the token back: HTTP libraries log its answer when told to, we do not.
        (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + "\n")
        hub.faults.append(Fault("POST", "/commit/", "echo"))
        with pytest.raises(OSError, match="may not write") as refused:
            push_to_hub(checkpoint, REPO, license=MIT)
        assert "<TOKEN>" in str(refused.value) and refused.value.__suppress_context__
        printed = capfd.readouterr()
        ours = [record.getMessage() for record in caplog.records if "minigpt4" in record.name]
        everything = [logged, *ours, str(refused.value), printed.out, printed.err]
        everything += [content.decode("latin-1") for content in contents(hub).values()]
        everything += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
        assert not any(TOKEN in text for text in everything)

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            (TOKEN, "Hugging Face token"),
            ("sk-proj-" + "a1" * 20, "API key"),
            ("ghp_" + "a1" * 18, "GitHub token"),
            ("AKIA" + "A1" * 8, "AWS key"),
            ("-----BEGIN OPENSSH PRIVATE KEY-----", "private key"),
            ("an-own-token-of-another-form", "your own token"),
        ],
    )
    def test_a_secret_in_a_file_is_refused(self, hub, checkpoint, text, kind):
        (checkpoint / "run.json").write_text(json.dumps({"environment": {"KEY": text}}))
        with pytest.raises(ValueError, match=f"run.json contains what looks like .*{kind}") as refused:
            push_to_hub(checkpoint, REPO, license=MIT, token="an-own-token-of-another-form")
        assert text not in str(refused.value)
        assert hub.requests == []

    def test_stray_things_stay(self, checkpoint, tmp_path):
        strays = [".env", "optimizer.pt", "pytorch_model.bin", "training_args.bin", "trainer_state.json", "token.json"]
        strays += ["my-credentials.json", "notes.txt", "README.md", "script.py", "events.out.tfevents.1"]
        for name in strays:
            (checkpoint / name).write_text("{}")
        for name in ("checkpoint-5", ".git"):
            (checkpoint / name).mkdir()
            (checkpoint / name / "model.safetensors").write_bytes(b"")
        (checkpoint / "LICENSE").write_text("mine")
        (checkpoint / "added_tokens.json").write_text("{}")
        publication = prepare(checkpoint, REPO, tmp_path, license=MIT)
        assert set(publication.left_out) == {*strays, "checkpoint-5/", ".git/"}
        assert {"LICENSE", "added_tokens.json", "tokenizer.json", "chat_template.jinja"} <= set(publication.files)
        assert publication.read("README.md") != b"{}"

    def test_folders_of_this_computer_stay(self, checkpoint, tmp_path):
        sources = ["table:clients/acme/photos.csv::images=/home/me/acme::weight=3", "wds:/mnt/acme/{0..9}.tar"]
        recipe = {"sources": sources, "model_name_or_path": "/home/me/acme/stage1", "logging_dir": "../acme/runs"}
        record = {"recipe": recipe, "changed_settings": recipe, "command": ["/home/me/bin/minigpt4", "train", "acme"]}
        (checkpoint / "run.json").write_text(json.dumps({**record, "rows": {sources[0]: {"rows": 5}}, "seed": 42}))
        publication = prepare(checkpoint, REPO, tmp_path / "scratch", license=MIT)
        kept = ["table:photos.csv::weight=3", "wds:{0..9}.tar"]
        expected = {"sources": kept, "model_name_or_path": "stage1", "logging_dir": "runs"}
        assert json.loads(publication.read("run.json")) == {
            "recipe": expected,
            "changed_settings": expected,
            "rows": {kept[0]: {"rows": 5}},
            "seed": 42,
        }
        assert "acme" not in publication.card and "| sources | table:photos.csv::weight=3, wds" in publication.card


def test_public_names(tmp_path):
    assert public_source("wds:/home/me/shards/{00000..00009}.tar::weight=3") == "wds:{00000..00009}.tar::weight=3"
    assert public_source("table:/home/me/a.csv::images=/home/me/shots") == "table:a.csv"
    assert public_source("dataset:somebody/captions::split=train") == "dataset:somebody/captions::split=train"
    assert public_source("https://example.org/a/b") == "https://example.org/a/b"
    assert public_source(str(tmp_path)) == tmp_path.name
    assert public_source("python:my.module:rows") == "python:my.module:rows"
    assert public_name("./runs/stage1") == "stage1"


class TestCommand:
    def test_dry_run_touches_no_network(self, hub, checkpoint, monkeypatch):
        def no_network(*_):
            raise AssertionError("the network was touched")

        monkeypatch.setattr(socket.socket, "connect", no_network)
        (checkpoint / "optimizer.pt").write_text("")
        result = minigpt4_push(checkpoint, REPO, "--license", "mit", "--revision", "v2", "--dry-run")
        assert result.exit_code == 0, result.exception
        assert hub.requests == []
        assert f"the model {REPO}" in result.stdout and "one commit on v2" in result.stdout
        size = (checkpoint / "model.safetensors").stat().st_size
        assert f"{size / 1e6:.1f} MB  model.safetensors" in result.stdout
        assert "modeling_minigpt4.py" in result.stdout and "optimizer.pt: a pickle" in result.stdout
        assert "pipeline_tag: image-text-to-text" in result.stdout and "## Limitations" in result.stdout

    def test_push_prints_the_address(self, hub, checkpoint):
        result = minigpt4_push(checkpoint, REPO, "--license", "mit", "--private", "--message", "Mine")
        assert result.exit_code == 0, result.exception
        assert result.stdout.strip() == f"{hub.url}/{REPO}"
        assert hub.repositories["models", REPO].private and hub.repositories["models", REPO].messages[-1] == "Mine"

    def test_own_card(self, hub, checkpoint, tmp_path):
        (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n# Mine\n")
        result = minigpt4_push(checkpoint, REPO, "--license", "mit", "--card", tmp_path / "card.md")
        assert result.exit_code == 0, result.exception
        assert contents(hub)["README.md"] == (tmp_path / "card.md").read_bytes()

    def test_other_license(self, hub, checkpoint):
        arguments = (checkpoint, REPO, "--license", "other", "--license-name", "llama-1", "--dry-run")
        assert "--license-link" in str(minigpt4_push(*arguments).exception)
        result = minigpt4_push(*arguments, "--license-link", "https://example.org/l", "--language", "de")
        fields = (
            "language:\n- de\nlibrary_name: transformers\nlicense: other\nlicense_name: llama-1\nlicense_link: https"
        )
        assert fields in result.stdout


class TestErrors:
    def refusal(self, source, tmp_path, repo_id=REPO, **options) -> str:
        with pytest.raises((ValueError, OSError)) as refused:
            prepare(source, repo_id, tmp_path, **{"license": MIT, **options})
        assert "\n" not in str(refused.value)
        return str(refused.value)

    def test_no_folder(self, tmp_path):
        assert "there is no folder" in self.refusal(tmp_path / "gone", tmp_path)

    @pytest.mark.parametrize("name", ["tiny", "a/b/c", "some body/tiny"])
    def test_bad_name(self, checkpoint, tmp_path, name):
        assert repr(name) in self.refusal(checkpoint, tmp_path, name)

    def test_another_model(self, checkpoint, tmp_path):
        (checkpoint / "config.json").write_text('{"model_type": "llava"}')
        assert "'llava'" in self.refusal(checkpoint, tmp_path)

    def test_no_model(self, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "no config.json" in self.refusal(tmp_path / "empty", tmp_path)

    def test_unknown_license(self, checkpoint, tmp_path):
        assert "--license" in self.refusal(checkpoint, tmp_path, license=None)

    def test_missing_shard(self, checkpoint, tmp_path):
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "lacks model-00001-of-00002.safetensors" in self.refusal(checkpoint, tmp_path)

    def test_truncated_weights(self, checkpoint, tmp_path):
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        assert "not a complete safetensors file" in self.refusal(checkpoint, tmp_path)

    def test_pickle_alone(self, checkpoint, tmp_path):
        (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
        assert "no safetensors weights" in self.refusal(checkpoint, tmp_path)

    def test_code_from_elsewhere(self, checkpoint, tmp_path):
        config = json.loads((checkpoint / "config.json").read_text())
        config["auto_map"]["AutoConfig"] = "else/where--configuration_minigpt4.MiniGPT4Config"
        (checkpoint / "config.json").write_text(json.dumps(config))
        assert "refers to code elsewhere" in self.refusal(checkpoint, tmp_path)

    def test_no_code_named(self, checkpoint, tmp_path):
        for path in checkpoint.glob("*config.json"):
            config = json.loads(path.read_text())
            path.write_text(json.dumps({**config, "auto_map": {}, "custom_pipelines": {}}))
        assert "auto_map" in self.refusal(checkpoint, tmp_path)

    def test_unknown_code(self, checkpoint, tmp_path):
        config = json.loads((checkpoint / "config.json").read_text())
        config["auto_map"]["AutoModelForX"] = "other.X"
        (checkpoint / "config.json").write_text(json.dumps(config))
        assert "names code in other.py" in self.refusal(checkpoint, tmp_path)

    def test_base_where_there_is_none(self, checkpoint, tmp_path):
        assert "leave it out" in self.refusal(checkpoint, tmp_path, base="a/b")

    def test_missing_code_comes_from_the_package(self, checkpoint, tmp_path):
        with_code = set(prepare(checkpoint, REPO, tmp_path, license=MIT).files)
        for path in checkpoint.glob("*.py"):
            path.unlink()
        assert set(prepare(checkpoint, REPO, tmp_path, license=MIT).files) == with_code
        assert "chat_templates_minigpt4.py" in with_code  # found through an import alone
