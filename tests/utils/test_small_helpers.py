"""Versions, revisions, headers of safetensors files, and the first line of an error."""

import json
import platform
import subprocess
from importlib import metadata

import pytest
import torch
from huggingface_hub.errors import SafetensorsParsingError
from safetensors.torch import save_file

from transformers_minigpt4.utils.files import to_json
from transformers_minigpt4.utils.safetensors_files import TensorSpan, tensor_spans
from transformers_minigpt4.utils.text import first_line, without_control_characters
from transformers_minigpt4.utils.versions import git_revision, package_version, package_versions


def test_versions():
    assert package_version("torch") == metadata.version("torch")
    assert package_version("no-such-package") == "not installed"
    versions = package_versions()
    assert versions["python"] == platform.python_version() and "transformers" in versions


def test_revision_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert git_revision() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    commit = git_revision()
    assert commit is not None and len(commit) == 40
    (tmp_path / "new").touch()
    assert git_revision() == f"{commit}+changes"
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    assert git_revision() == f"{commit}+changes", "changes elsewhere in the repository count"
    assert git_revision(tracked=tmp_path / "new") is None
    subprocess.run([*git, "add", "new"], check=True)
    assert git_revision(tracked=tmp_path / "new") == f"{commit}+changes"


def test_spans_of_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
    save_file(tensors, path, metadata={"format": "pt"})
    spans = tensor_spans(path)
    assert spans.keys() == tensors.keys() and spans["a"].dtype == "F32" and spans["b"].shape == (5,)
    content = path.read_bytes()
    for name, span in spans.items():
        assert content[span.begin : span.end] == tensors[name].view(torch.uint8).numpy().tobytes()
    assert isinstance(spans["a"], TensorSpan)


def test_spans_of_an_empty_and_of_a_broken_file(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    assert tensor_spans(tmp_path / "empty.safetensors") == {}
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(SafetensorsParsingError):
        tensor_spans(tmp_path / "broken.safetensors")


def test_first_line():
    assert first_line(ValueError("\n  one.\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"


def test_a_terminal_obeys_no_text_of_others():
    hostile = "\x1b]0;title\x07\x1b[2Ja\tb\n\x9b31mred\r\x7f é 狗"
    assert without_control_characters(hostile) == "]0;title[2Ja\tb\n31mred é 狗"
    line = to_json({"caption": hostile})
    assert without_control_characters(line) == line and json.loads(line) == {"caption": hostile}
