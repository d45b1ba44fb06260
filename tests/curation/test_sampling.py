"""Sampling images: seeded, spread over shards, resumed, without duplicates; every skipped row has its reason."""

import errno
import io
import json
import os
import sys
import tarfile
import types
from dataclasses import replace

import pytest
from PIL import Image

from transformers_minigpt4.curation import sampling
from transformers_minigpt4.curation.config import CurationConfig
from transformers_minigpt4.curation.records import IMAGES
from transformers_minigpt4.curation.sampling import sample_images
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.curation.store import Project
from transformers_minigpt4.data.schema import DataError


def content(number, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, number // 256, 90)).save(file, format=kind)
    return file.getvalue()


def listing(folder, images):
    """A `table:` source; `images` maps names to bytes, or to `None` for a file that is missing."""
    folder.mkdir(exist_ok=True)
    for name, data in images.items():
        if data is not None:
            (folder / name).write_bytes(data)
    lines = [json.dumps({"path": name, "caption": f"text of {name}"}) for name in images]
    (folder / "list.jsonl").write_text("\n".join(lines))
    return f"table:{folder / 'list.jsonl'}"


def shards(folder, count, rows):
    folder.mkdir()
    for place in range(count):
        with tarfile.open(folder / f"{place:05}.tar", "w") as archive:
            for number in range(place * rows, (place + 1) * rows):
                for name, data in ((f"{number:06}.png", content(number)), (f"{number:06}.json", b'{"caption": "x"}')):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return f"wds:{folder}"


def config(source, images, **changes):
    return CurationConfig(source, "checkpoint", images=images, **changes)


def sampled(folder, settings):
    """The source's keys in the order of sampling."""
    with Project.create(folder, settings) as project:
        sample_images(project, settings, False)
        return [pair.origin["key"] for pair in project.pairs()]


def test_sampling_is_random_and_repeats_with_its_seed(tmp_path):
    source = listing(tmp_path / "source", {f"{n}.png": content(n) for n in range(40)})
    first = sampled(tmp_path / "a", config(source, 10))
    assert first == sampled(tmp_path / "b", config(source, 10)) and len(set(first)) == 10
    assert first != sorted(first) and first != sampled(tmp_path / "c", config(source, 10, seed=1))


def test_every_pair_is_recorded_and_copied(tmp_path):
    source = listing(tmp_path / "source", {"a.jpg": content(1, "JPEG"), "b.png": content(2)})
    settings = config(source, 5)
    with Project.create(tmp_path / "project", settings) as project:
        done = sample_images(project, settings, False)
        assert "2 images sampled, 2 of them now; the source has no more, although 5 were asked for" in str(done)
        for pair in project.pairs():
            name = pair.origin["caption"].removeprefix("text of ")
            assert project.image_path(pair).read_bytes() == (tmp_path / "source" / name).read_bytes()
            assert (pair.source, pair.image) == (source, f"{IMAGES}/{pair.key}{name[1:]}")
            assert pair.key.startswith(f"{pair.id:05d}")


def test_what_cannot_be_used_is_skipped_with_its_reason(tmp_path):
    rows = {"0.png": content(0), "1.png": b"<html>", "2.png": None, "3.png": content(0), "4.png": content(4)}
    settings = config(listing(tmp_path / "source", rows), 5)
    with Project.create(tmp_path / "project", settings) as project:
        done = sample_images(project, settings, False)
        assert (done.total, done.skipped) == (2, 3)
        assert project.funnel().skipped == {"image": 2, "duplicate": 1}
        reasons = {row["source_key"]: row["reason"] for row in project.skipped()}
        assert "the same image as 0000" in "".join(reasons.values())
        assert all(reasons.values())
        assert sample_images(project, settings, False).skipped == 0  # known already


def test_sampling_resumes_where_it_was_stopped(tmp_path, monkeypatch):
    source = listing(tmp_path / "source", {f"{n}.png": content(n) for n in range(40)})
    settings = config(source, 20)
    whole = sampled(tmp_path / "whole", settings)
    monkeypatch.setattr(sampling, "_TOGETHER", 4)
    write, written = sampling._write, []

    def stopping(path, data):
        if len(written) == 10:
            written.append(path)
            raise KeyboardInterrupt
        written.append(path)
        write(path, data)

    monkeypatch.setattr(sampling, "_write", stopping)
    with Project.create(tmp_path / "stopped", settings) as project:
        with pytest.raises(KeyboardInterrupt):
            sample_images(project, settings, False)
        assert len(list(project.pairs())) == 8
    assert sampled(tmp_path / "stopped", settings) == whole
    assert len(list((tmp_path / "stopped" / IMAGES).iterdir())) == 20


def test_more_images_later(tmp_path):
    source = listing(tmp_path / "source", {f"{n}.png": content(n) for n in range(40)})
    first = sampled(tmp_path / "project", config(source, 10))
    more = sampled(tmp_path / "project", config(source, 15))
    assert more[:10] == first and len(set(more)) == 15
    assert sampled(tmp_path / "project", config(source, 5)) == more


def test_rows_come_from_many_shards(tmp_path):
    source = shards(tmp_path / "source", 6, 10)
    keys = sampled(tmp_path / "project", config(source, 12))
    assert {int(key[-6:]) // 10 for key in keys} == set(range(6))
    assert len(sampled(tmp_path / "all", config(source, 100))) == 60


def test_a_folder_of_images(tmp_path):
    (tmp_path / "source" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "deep/a.png")):
        (tmp_path / "source" / name).write_bytes(content(number))
    (tmp_path / "source" / "notes.txt").write_text("no image")
    assert sorted(sampled(tmp_path / "project", config(str(tmp_path / "source"), 9))) == [
        "a.png",
        "b.png",
        "deep/a.png",
    ]


@pytest.fixture
def function(monkeypatch):
    module = types.ModuleType("images_for_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.rows = lambda count, seed: [
        {"image": Image.new("RGB", (4, 4), (n, seed, 0)), "key": f"key {n}", "truth": str(n)} for n in range(count)
    ]
    module.bad = lambda count, seed: [{"image": None}]
    return f"python:{module.__name__}"


def test_a_function_as_source(tmp_path, function):
    settings = config(f"{function}:rows", 3)
    with Project.create(tmp_path, settings) as project:
        sample_images(project, settings, False)
        assert [pair.key for pair in project.pairs()] == ["00001-key-0", "00002-key-1", "00003-key-2"]
        assert next(project.pairs()).origin == {"key": "key 0", "truth": "0"}
        with Image.open(project.image_path(next(project.pairs()))) as image:
            assert image.getpixel((0, 0)) == (0, 42, 0)


def test_sources_that_do_not_work(tmp_path, function):
    def fails(source, error, message):
        settings = config(source, 3)
        with Project.create(tmp_path / "project", settings) as project, pytest.raises(error, match=message):
            sample_images(project, settings, False)

    fails("somewhere", DataError, "is not a source; write KIND:PATH")
    fails("table:nowhere.csv", DataError, r"there is no nowhere\.csv")
    fails(f"{function}:bad", CurationError, "needs a PIL image as `image`")
    fails(f"{function}:none", CurationError, "cannot be found .*write python:MODULE:FUNCTION")
    fails("python:no.such:thing", CurationError, "cannot be found")
    fails(listing(tmp_path / "broken", {"1.png": b"x"}), CurationError, "gave no usable image; 1 rows were skipped")


def test_a_project_keeps_its_source_and_seed(tmp_path):
    source = listing(tmp_path / "source", {f"{n}.png": content(n) for n in range(4)})
    sampled(tmp_path / "project", config(source, 2))
    for other in (config(source, 2, seed=5), replace(config(source, 2), source=f"{source}::images={tmp_path}")):
        with pytest.raises(CurationError, match=r"were sampled from .* with seed 42, but"):
            sampled(tmp_path / "project", other)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "1.png").write_bytes(content(1))
    settings = config(str(tmp_path / "source"), 1)
    with Project.create(tmp_path / "project", settings) as project:
        with monkeypatch.context() as patch, pytest.raises(CurationError, match="No space left on device; free some"):
            patch.setattr(os, "fsync", full)
            sample_images(project, settings, False)
        assert list((tmp_path / "project" / IMAGES).iterdir()) == []
        assert sample_images(project, settings, False).new == 1


@pytest.mark.skipif(sys.platform != "linux", reason="file names of other systems are Unicode")
def test_a_file_name_that_is_not_unicode(tmp_path):
    folder = os.fsencode(tmp_path / "images")
    os.mkdir(folder)
    for name, data in ((b"\xff.png", content(1)), (b"\xfe.png", content(2)), (b"\xfd.png", b"no image")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
    settings = config(str(tmp_path / "images"), 3)
    for _ in range(2):  # the second run knows them
        assert sorted(sampled(tmp_path / "project", settings)) == ["\udcfe.png", "\udcff.png"]
    with Project.open(tmp_path / "project", settings) as project:
        assert [row["source_key"] for row in project.skipped()] == ["\\udcfd.png"]
