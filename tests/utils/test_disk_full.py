"""A full disk: the error names what was being written, and nothing is half-written."""

import errno
import os
import sqlite3

import pytest
from safetensors import SafetensorError

from transformers_minigpt4.utils.disk_full import is_disk_full
from transformers_minigpt4.utils.files import JsonLinesWriter, atomic_file, atomic_folder, write_json


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(*_):
    raise FULL


def test_files_and_folders(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    for context in (atomic_file(tmp_path / "a.json"), atomic_folder(tmp_path / "folder")):
        with pytest.raises(OSError, match="No space left") as caught, context:
            fail()
        assert caught.value.filename in (str(tmp_path / "a.json"), str(tmp_path / "folder"))
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write_json(tmp_path / "a.json", {"a": 2})
    assert caught.value.filename == str(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}\n' and (tmp_path / "folder" / "old").exists()
    assert sorted(os.listdir(tmp_path)) == ["a.json", "folder"]


def test_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    with JsonLinesWriter(path) as lines:
        lines.append([{"a": 1}])
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left") as caught:
            lines.append([{"a": 2}])
    assert caught.value.filename == str(path)


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        sqlite3.OperationalError("database or disk is full"),
    ],
)
def test_what_libraries_say(error):
    assert is_disk_full(error) and not is_disk_full(OSError(errno.EACCES, "Permission denied"))
