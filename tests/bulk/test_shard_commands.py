"""`minigpt4 describe --output KIND:FOLDER` in one process, and options that do not go together."""

import json
from pathlib import Path

import pytest
from datasets import load_dataset
from tiny_models import drawn_image, write_sources
from typer.testing import CliRunner

from transformers_minigpt4.cli import app
from transformers_minigpt4.data.sources import open_rows
from transformers_minigpt4.hub.captions import read_captions
from transformers_minigpt4.inference.engines import TransformersEngine


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(5):
        drawn_image(number).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no image")
    return str(folder)


def describe(*words: str):
    return CliRunner().invoke(app, ["describe", *words, "--max-new-tokens", "2"])


def test_a_folder_of_shards_is_written_once_and_completed_later(photos, tiny_checkpoint, tmp_path):
    words = (photos, "--model", tiny_checkpoint, "--shard-size", "2", "--output", f"jsonl:{tmp_path}/out")
    done = describe(*words)
    assert done.exit_code == 1, done.output
    assert done.stderr == f"4 described in {tmp_path}/out, 1 failed; see .captions-*.errors there\n"
    files = sorted((tmp_path / "out").glob("*.jsonl"))
    assert [file.name for file in files] == [f"captions-0000{number}-of-00003.jsonl" for number in range(3)]
    errors = (tmp_path / "out" / ".captions-00001-of-00003.jsonl.errors").read_text()
    assert json.loads(errors)["image"] == f"{photos}/3.png"
    before = files[1].stat()
    again = describe(*words)
    assert (again.exit_code, again.stderr) == (0, f"all 3 shards are in {tmp_path}/out already\n")
    files[0].unlink()
    once_more = describe(*words)
    assert (once_more.exit_code, once_more.stderr) == (0, f"2 described in {tmp_path}/out, 0 failed\n")
    assert files[1].stat() == before
    read = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert read["image"] == [f"{photos}/{number}.png" for number in (0, 1, 2, 4)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "wds"])
def test_a_shard_in_which_every_image_failed(kind, tiny_checkpoint, tmp_path):
    """It is finished, and what `datasets` and training read has no empty file, which some of them fail on."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for number in range(4):
        drawn_image(number).save(photos / f"{number}.png")
    for number in range(2):
        (photos / f"{number}.png").write_bytes(b"no image")
    words = (str(photos), "--model", tiny_checkpoint, "--shard-size", "2", "--output", f"{kind}:{out}")
    done = describe(*words)
    assert (done.exit_code, done.stderr) == (1, f"2 described in {out}, 2 failed; see .captions-*.errors there\n")
    suffix = {"wds": "tar"}.get(kind, kind)
    assert [path.name for path in out.glob("[!.]*")] == [f"captions-00001-of-00002.{suffix}"]
    assert len((out / f".captions-00000-of-00002.{suffix}.errors").read_text().splitlines()) == 2
    assert len(load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))) == 2
    source = {"jsonl": f"table:{out}/captions-00001-of-00002.jsonl::images=/", "parquet": f"dataset:{out}"}
    rows = open_rows(source.get(kind, f"wds:{out}"), "stage1", epochs=1, shuffle=False)
    assert len(list(rows.dataset)) == 2
    if kind != "jsonl":
        assert len(read_captions(out, tmp_path / "cache")[0]) == 2  # complete for `minigpt4 push`
    again = describe(*words)
    assert (again.exit_code, again.stderr) == (0, f"all 2 shards are in {out} already\n")
    (out / f".captions-00000-of-00002.{suffix}.empty").unlink()
    assert describe(*words).exit_code == 1


@pytest.mark.parametrize(("kind", "output"), [("imagefolder", "jsonl:captions"), ("wds", "captions.jsonl")])
def test_a_stopped_run_on_a_source_is_resumed(kind, output, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "wds":
        source = write_sources(tmp_path / "data")["wds"]
    else:
        (tmp_path / "photos").mkdir()
        for number in range(12):
            drawn_image(number).save(tmp_path / "photos" / f"{number:02d}.png")
        (tmp_path / "photos" / "metadata.csv").write_text("file_name\n" + "".join(f"{n:02d}.png\n" for n in range(12)))
        source = "imagefolder:photos"
    words = (source, "--model", tiny_checkpoint, "--batch-size", "2", "--shard-size", "3", "--output", output)
    answers = TransformersEngine.answers
    asked = []

    def stopped(engine, requests, **settings):
        for answer in answers(engine, requests, **settings):
            asked.append(answer)
            if len(asked) == 6:
                raise KeyboardInterrupt
            yield answer

    def keys() -> list[str]:
        files = [Path(output)] if ":" not in output else sorted(Path("captions").glob("*.jsonl"))
        return [json.loads(line)["image"] for file in files for line in file.read_text().splitlines()]

    monkeypatch.setattr(TransformersEngine, "answers", stopped)
    done = describe(*words)
    assert done.exit_code == 130
    assert "resumes" in done.stderr and len(done.stderr.splitlines()) == 1
    begun = keys()
    assert begun and len(begun) < 6
    assert describe(*words).exit_code == 0
    assert keys()[: len(begun)] == begun
    assert len(set(keys())) == len(keys()) == 12
    assert len(asked) == 6 + 12 - len(begun)
    before = list(asked)
    assert describe(*words).exit_code == 0
    assert asked == before  # nothing is left


def test_other_images_and_prompts_are_refused(photos, tiny_checkpoint, tmp_path):
    words = ("--model", tiny_checkpoint, "--output", f"parquet:{tmp_path}/out")
    assert describe(f"{photos}/0.png", *words).exit_code == 0
    other = describe(f"{photos}/1.png", *words)
    assert other.exit_code == 1
    assert 'was made with images "1 files with the hash ' in other.stderr and len(other.stderr.splitlines()) == 1
    other = describe(f"{photos}/0.png", *words, "--prompt", "What is this?")
    assert 'was made with prompt "Describe this image in detail.", but this run has prompt' in other.stderr


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (
            ("a.png", "--ray-workers", "2"),
            {},
            "several processes write a folder; name one and its format",
        ),
        (("a.png", "--ray-workers", "2", "--output", "a.jsonl"), {}, "instead of 'a.jsonl'"),
        (("a.png", "--ray-workers", "0"), {}, "--ray-workers is '0'; give a number from 1, or auto"),
        (("a.png",), {"RANK": "0", "WORLD_SIZE": "2"}, "several processes write a folder"),
        (("a.png", "--ray-workers", "2"), {"RANK": "0", "WORLD_SIZE": "2"}, "leave one of them out"),
        (("-", "--output", "jsonl:out"), {"RANK": "0", "WORLD_SIZE": "2"}, "cannot share standard input"),
    ],
)
def test_what_does_not_go_together_is_one_line(words, variables, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = describe(*words)
    assert done.exit_code == 1
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
