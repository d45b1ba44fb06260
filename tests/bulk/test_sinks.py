"""Checks the formats of captions: complete or not there, read back by `datasets` and by our training readers."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image
from pyarrow.parquet import read_metadata
from tiny_models import drawn_image

from transformers_minigpt4.bulk.images import BulkImage, Description
from transformers_minigpt4.bulk.parquet_sink import ParquetSink
from transformers_minigpt4.bulk.sinks import JsonLinesSink, errors_file, write_shard
from transformers_minigpt4.bulk.sources import open_sources
from transformers_minigpt4.bulk.webdataset_sink import WebdatasetSink
from transformers_minigpt4.data.sources import open_rows


SINKS = [JsonLinesSink, ParquetSink, WebdatasetSink]


def content_of(number: int) -> bytes:
    """An image file, of either of two formats."""
    buffer = io.BytesIO()
    drawn_image(number).save(buffer, format=("JPEG", "PNG")[number % 2])
    return buffer.getvalue()


def descriptions(folder: Path, count: int = 6, bad: tuple[int, ...] = (2,)) -> list[Description]:
    rows = []
    for number in range(count):
        path = folder / f"{number} ü.img"
        if number in bad:
            rows.append(Description(BulkImage(str(path), str(path)), error="it is broken"))
        else:
            content = content_of(number)
            path.write_bytes(content)
            rows.append(Description(BulkImage(str(path), str(path), content=content), caption=f"a dog, {number}"))
    return rows


def source_of(path: Path, sink: object) -> str:
    """The file as a source of training rows."""
    kind = {JsonLinesSink: "table", ParquetSink: "dataset", WebdatasetSink: "wds"}[type(sink)]
    return f"{kind}:{path}" + ("::images=/" if kind == "table" else "")


@pytest.fixture(params=SINKS)
def sink(request):
    return request.param("What is it?", "my-model")


@pytest.fixture
def written(sink, tmp_path) -> Path:
    """A file of five captions; the third image failed."""
    path = tmp_path / "out" / f"captions-00000-of-00001{sink.suffix}"
    path.parent.mkdir()
    assert write_shard(path, sink, descriptions(tmp_path)) == (5, 1)
    return path


def test_what_is_written(sink, written, tmp_path):
    assert sorted(path.name for path in written.parent.iterdir()) == [f".{written.name}.errors", written.name]
    failed = json.loads(errors_file(written).read_text())
    assert failed == {"image": f"{tmp_path}/2 ü.img", "error": "it is broken"}


def test_datasets_reads_it(sink, written, tmp_path):
    rows = load_dataset(str(written.parent), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 5
    for number, row in zip((0, 1, 3, 4, 5), rows):
        row = {**row, **(row.get("json") or {})}
        expected = {"caption": f"a dog, {number}", "prompt": "What is it?", "model": "my-model"}
        assert {name: row[name] for name in expected} == expected
        assert (row.get("key") or row["image"]) == f"{tmp_path}/{number} ü.img"
        image = row.get("jpg", row["image"])
        assert (image.size == (60, 48)) if isinstance(image, Image.Image) else isinstance(sink, JsonLinesSink)


def test_training_reads_it(sink, written, tmp_path):
    rows = open_rows(source_of(written, sink), "stage1", epochs=1, shuffle=False)
    found = list(rows.dataset)
    assert [row["completion"] for row in found] == [f"a dog, {n}\n" for n in (0, 1, 3, 4, 5)]
    assert all(row["images"][0].size == (60, 48) for row in found)


@pytest.mark.parametrize("sink", [JsonLinesSink("p", "m"), ParquetSink("p", "m")])
def test_a_shard_without_captions_does_not_keep_datasets_from_reading(sink, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    write_shard(folder / f"captions-0{sink.suffix}", sink, [Description(BulkImage("x", b""), error="it is broken")])
    write_shard(folder / f"captions-1{sink.suffix}", sink, descriptions(tmp_path))
    assert len(load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))) == 5


def test_the_images_own_bytes_are_kept(tmp_path):
    for sink in (ParquetSink("p", "m"), WebdatasetSink("p", "m")):
        path = tmp_path / f"a{sink.suffix}"
        write_shard(path, sink, descriptions(tmp_path))
        _, (shard,) = open_sources([source_of(path, sink)])
        assert [image.source for image in shard.images()] == [content_of(number) for number in (0, 1, 3, 4, 5)]


def test_parquet_files_have_no_row_group_without_rows(tmp_path):
    image = BulkImage("a.png", "a.png", content=content_of(0))
    for count in (0, 100):
        path = tmp_path / f"{count}.parquet"
        write_shard(path, ParquetSink("p", "m"), [Description(image, caption="a dog")] * count)
        assert read_metadata(path).num_row_groups == count // 100
    assert len(load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))) == 100


def test_tar_files_keep_the_names_of_the_shard_they_come_from(tmp_path):
    path = tmp_path / "a.tar"
    rows = [Description(BulkImage(f"x.tar/{n}", b"", n, content_of(0)), caption="a dog") for n in ("a/7", "a/8")]
    write_shard(path, WebdatasetSink("p", "m"), rows)
    assert [row["__key__"] for row in load_dataset("webdataset", data_files=str(path), split="train")] == [
        "a/7",
        "a/8",
    ]


def test_the_same_captions_give_the_same_file(sink, tmp_path):
    contents = []
    for name in ("a", "b"):
        write_shard(tmp_path / name, sink, descriptions(tmp_path))
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


def test_an_error_leaves_the_old_file(sink, written, tmp_path):
    before = written.read_bytes()

    def broken():
        yield from descriptions(tmp_path)
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        write_shard(written, sink, broken())
    assert written.read_bytes() == before
    assert sorted(path.name for path in written.parent.iterdir()) == [f".{written.name}.errors", written.name]


def test_what_failed_before_and_does_no_longer_is_forgotten(sink, written, tmp_path):
    assert write_shard(written, sink, descriptions(tmp_path, bad=())) == (6, 0)
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_hostile_texts(sink, tmp_path):
    texts = ["\udc80", "\x00", "a\u2028b\r\n", "=1+1", "<ImageHere>", "x" * 100_000]
    rows = [Description(BulkImage(text, text, content=content_of(0)), caption=text) for text in texts]
    path = tmp_path / f"a{sink.suffix}"
    assert write_shard(path, sink, rows) == (6, 0)
    builder = {".jsonl": "json", ".parquet": "parquet", ".tar": "webdataset"}[sink.suffix]
    read = load_dataset(builder, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    captions = [(row.get("json") or row)["caption"] for row in read]
    assert captions[1:] == texts[1:] and len(captions[0]) in (1, 3)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r}); sys.path.insert(0, {bulk!r})
from test_sinks import SINKS, descriptions
from transformers_minigpt4.bulk.sinks import write_shard

def rows():
    for number, row in enumerate(descriptions(Path({folder!r}), 300)):
        if number == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield row

sink = SINKS[{which}]("p", "m")
write_shard(Path({folder!r}) / f"out{{sink.suffix}}", sink, rows())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("which", range(len(SINKS)), ids=[sink.kind for sink in SINKS])
def test_a_killed_process_leaves_no_file(which, tmp_path):
    here = Path(__file__).parent
    script = KILLED.format(tests=str(here.parent), bulk=str(here), folder=str(tmp_path), at=250, which=which)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env={**os.environ})
    assert done.returncode == -signal.SIGKILL, done.stderr
    sink = SINKS[which]("p", "m")
    path = tmp_path / f"out{sink.suffix}"
    assert not path.exists()
    assert write_shard(path, sink, descriptions(tmp_path)) == (5, 1)
