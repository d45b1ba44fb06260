"""Shards: damage of every kind is found, what is intact is still read, and patterns match what they should."""

import gzip
import json
import tarfile

import fsspec
import pytest
from data_files import caption, image_bytes, numbers, sample, shard, shards

from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.data.sources import open_rows
from transformers_minigpt4.data.webdataset import expand_braces, find_shards


def read(source, **options):
    rows = open_rows(source, "stage2", epochs=1, shuffle=False, **options)
    found = numbers(rows.dataset)
    (seen,) = rows.skipped.counts().values()
    return found, {kind: count for kind, count in seen.items() if count and kind not in ("rows", "shards")}


def ends(path):
    """Offsets behind the content of each file of a shard."""
    with tarfile.open(path) as archive:
        return [member.offset_data + member.size for member in archive]


class TestDamage:
    @pytest.fixture
    def source(self, tmp_path):
        """Two shards of four rows, the first of which gets damaged."""
        return shards(tmp_path, 2, 4), tmp_path / "00000.tar"

    def test_cut_inside_an_image(self, source):
        pattern, path = source
        path.write_bytes(path.read_bytes()[: ends(path)[4] - 10])  # the third sample's image
        assert read(pattern) == ([0, 1, 4, 5, 6, 7], {"shard": 1})

    def test_cut_between_image_and_text(self, source):
        pattern, path = source
        path.write_bytes(path.read_bytes()[: -(-ends(path)[4] // 512) * 512])
        assert read(pattern) == ([0, 1, 4, 5, 6, 7], {"shard": 1})

    def test_cut_inside_a_header(self, source):
        pattern, path = source
        path.write_bytes(path.read_bytes()[: -(-ends(path)[3] // 512) * 512 + 100])
        assert read(pattern) == ([0, 4, 5, 6, 7], {"shard": 1})

    def test_a_damaged_header_is_no_end(self, source):
        pattern, path = source
        content = bytearray(path.read_bytes())
        start = -(-ends(path)[3] // 512) * 512
        content[start : start + 200] = b"\xff" * 200
        path.write_bytes(content)
        assert read(pattern) == ([0, 4, 5, 6, 7], {"shard": 1})

    @pytest.mark.parametrize("content", [b"", b"not a tar" * 200], ids=["empty", "noise"])
    def test_no_shard_at_all(self, source, content):
        pattern, path = source
        path.write_bytes(content)
        assert read(pattern) == ([4, 5, 6, 7], {"shard": 1})

    def test_missing(self, source):
        pattern, path = source
        path.unlink()
        assert read(pattern) == ([4, 5, 6, 7], {"shard": 1})

    def test_compressed_and_cut(self, source):
        pattern, path = source
        content = gzip.compress(path.read_bytes())
        path.write_bytes(content)
        assert read(pattern) == (list(range(8)), {})
        path.write_bytes(content[: len(content) // 2])
        found, skipped = read(pattern)
        assert found[-4:] == [4, 5, 6, 7] and skipped == {"shard": 1}

    def test_many_broken_shards_stop_the_run(self, tmp_path):
        pattern = shards(tmp_path, 12, 2)
        for place in (3, 4, 9):
            (tmp_path / f"{place:05}.tar").write_bytes(b"")
        rows = open_rows(pattern, "stage2", epochs=1, shuffle=False)
        with pytest.raises(DataError, match=r"3 of the first 10 shards .* the last was .*00009\.tar: ReadError"):
            list(rows.dataset)
        shards(tmp_path, 5, 2)
        assert read(pattern)[1] == {"shard": 1}


def test_bad_samples(tmp_path):
    text = json.dumps({"caption": caption(1)}).encode()
    samples = {
        "0": sample(0),
        "1": {"json": text, "txt": b"other", "jpg": image_bytes(1, "JPEG")},
        "2": {"png": image_bytes(2), "txt": caption(2).encode()},
        "3": {"png": image_bytes(3), "json": b"{"},
        "4": {"png": image_bytes(4), "json": b"[]"},
        "5": {"png": image_bytes(5), "json": b'{"caption": ""}'},
        "6": {"png": image_bytes(6)},
        "7": {"json": text},
        "8": {"png": image_bytes(8)[:45], "json": text},
        "9": {"png": image_bytes(9), "jpg": image_bytes(9), "json": text},
        "sub/10": {"PNG": image_bytes(10), "json": json.dumps({"caption": caption(10)}).encode()},
        ".hidden": {"png": image_bytes(3)},
    }
    source = f"wds:{shard(tmp_path / 'a.tar', samples)}"
    found, skipped = read(source)
    assert found == [0, 1, 2, 10]
    assert skipped == {"entry": 2, "caption": 2, "image": 2, "unreadable_image": 1}
    rows = open_rows(source, "stage2", epochs=1, shuffle=False)
    assert [row["key"] for row in rows.dataset] == ["a.tar/0", "a.tar/1", "a.tar/2", "a.tar/sub/10"]


def test_a_name_twice(tmp_path):
    path = shard(tmp_path / "a.tar", {"0": sample(0)})
    again = shard(tmp_path / "b.tar", {"0": sample(1), "1": sample(1)})
    with tarfile.open(path, "a") as archive, tarfile.open(again) as other:
        for member in other:
            archive.addfile(member, other.extractfile(member))
    assert read(f"wds:{path}") == ([1], {"entry": 1})


class TestPatterns:
    def test_braces(self):
        assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
        assert expand_braces("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"]
        assert expand_braces("plain") == ["plain"]

    def test_local(self, tmp_path):
        shards(tmp_path, 3, 1)
        names = [str(tmp_path / f"{place:05}.tar") for place in range(3)]
        for pattern in (
            tmp_path,
            f"{tmp_path}/*.tar",
            f"{tmp_path}/{{00000..00002}}.tar",
            f"{tmp_path}/*{{0,1,2}}.tar",
        ):
            assert find_shards(str(pattern)) == names
        odd = tmp_path / "my [set] 1"
        shards(odd, 1, 1)
        assert find_shards(str(odd)) == find_shards(str(odd / "00000.tar")) == [str(odd / "00000.tar")]

    def test_remote(self, tmp_path):
        """Another file system of fsspec takes the place of the Hub's, `hf://`."""
        shards(tmp_path, 2, 3)
        memory = fsspec.filesystem("memory")
        for place in range(2):
            memory.pipe(f"/set/train-{place:05}.tar", (tmp_path / f"{place:05}.tar").read_bytes())
        for pattern in ("memory://set/*.tar", "memory://set/train-{00000..00001}.tar"):
            assert read(f"wds:{pattern}") == (list(range(6)), {})
        memory.pipe("/set/train-00001.tar", memory.cat("/set/train-00001.tar")[:3000])
        found, skipped = read("wds:memory://set/*.tar")
        assert found[:3] == [0, 1, 2] and skipped == {"shard": 1}
        assert read("wds:memory://set/train-{00000..00002}.tar")[1] == {"shard": 2}

    def test_a_name_that_is_neither_here_nor_on_the_hub(self, monkeypatch):
        def refuse(*_):
            raise OSError("offline")

        monkeypatch.setattr("transformers_minigpt4.data.webdataset._expand_remote", refuse)
        with pytest.raises(
            DataError,
            match=r"no 'my/shards' on this computer, and the Hub cannot list a dataset of that name: offline",
        ):
            find_shards("my/shards")

    def test_the_training_shards_of_the_hub(self, monkeypatch):
        listed = [f"hf://datasets/a/b/{split}-{n}.tar" for split in ("train", "validation") for n in range(2)]
        monkeypatch.setattr("transformers_minigpt4.data.webdataset._expand_remote", lambda url: listed)
        assert find_shards("a/b") == listed[:2]
