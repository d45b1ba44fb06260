"""The example scripts and the notebook run as they are, on the checkpoint that the demo leaves."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from datasets import load_from_disk
from nbclient import NotebookClient


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(demo_run, tmp_path):
    """Runs an example where `minigpt4-demo` is, as its header says; returns the lines that it prints."""

    def run(name: str, writes: bool = True) -> list[str]:
        output = ["--output", str(tmp_path)] if writes else []
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name), *output],
            cwd=demo_run.parent,
            env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    return run


def test_every_example_is_tested():
    text = Path(__file__).read_text(encoding="utf-8")
    examples = [path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert len(examples) >= 6 and [path.name for path in examples if path.name not in text] == []


def test_caption_folder(run, tmp_path):
    (line,) = run("caption_folder.py")
    assert line.startswith("12 captions in ")
    dataset = load_from_disk(tmp_path)
    assert len(dataset) == 12 and all("picture" in row or "image" in row for row in dataset["caption"])


def test_finetune_own_pairs(run):
    before, after, wanted = run("finetune_own_pairs.py")[-3:]
    assert "bottom left" in wanted and "bottom left" not in before
    assert "bottom left" in after


@pytest.mark.slow
def test_lora(run, tmp_path):
    *_, answer, _ = run("lora.py")
    assert answer.endswith("The orange circle is large.")  # the demo's checkpoint says "The circle is large."
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "merged/model.safetensors").is_file()


@pytest.mark.slow
def test_evaluate_own_task(run, tmp_path):
    first, *_ = run("evaluate_own_task.py")
    name, _, figures = first.partition(": ")
    assert name == "accuracy" and float(figures.split(" %")[0]) > 90
    assert len((tmp_path / "answers" / "color_and_shape.jsonl").read_text().splitlines()) == 24


def test_several_images(run):
    first, second, third = run("several_images.py", writes=False)
    assert first.startswith("[1 image(s)") and first.endswith("-> It is yellow.")
    assert second.startswith("[3 image(s)") and third.startswith("[3 image(s)")
    assert third.split("-> ")[1]


def test_notebook(demo_run, tmp_path, monkeypatch):
    for variable in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "HF_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(demo_run.parent)}}
    ).execute()
    # A cell's output arrives in as many pieces as it pleases.
    outputs = [[o for o in cell.get("outputs", []) if o.get("name") == "stdout"] for cell in notebook.cells]
    printed = ["".join(output["text"] for output in pieces) for pieces in outputs if pieces]
    assert len(printed) == 4
    assert "What color is it? -> It is yellow." in printed[0] and "What color is it? -> It is yellow." in printed[3]
