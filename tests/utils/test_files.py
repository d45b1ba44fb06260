"""Files and folders that are replaced as a whole, JSON Lines after a kill, and the lock on a folder."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from processes import program

from transformers_minigpt4.utils.files import (
    JsonLinesWriter,
    atomic_file,
    atomic_folder,
    folder_lock,
    replace_folder,
    to_json,
    write_atomically,
)


class TestAtomicFile:
    def test_content_appears_at_the_end(self, tmp_path):
        path = tmp_path / "file.txt"
        path.write_text("old")
        with atomic_file(path) as scratch:
            scratch.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new" and os.listdir(tmp_path) == ["file.txt"]

    def test_an_error_leaves_the_old_content(self, tmp_path):
        path = tmp_path / "file.txt"
        path.write_text("old")
        with pytest.raises(RuntimeError), atomic_file(path) as scratch:
            scratch.write_text("half")
            raise RuntimeError
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]

    def test_text_is_utf_8_and_permissions_follow_the_umask(self, tmp_path):
        write_atomically(tmp_path / "text", "ü")
        (tmp_path / "plain").touch()
        assert (tmp_path / "text").read_bytes() == "ü".encode()
        assert (tmp_path / "text").stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestAtomicFolder:
    def test_a_folder_replaces_an_older_one(self, tmp_path):
        folder = tmp_path / "parent" / "folder"
        for content in ("old", "new"):
            with atomic_folder(folder) as scratch:
                (scratch / content).touch()
        assert os.listdir(folder) == ["new"] and os.listdir(folder.parent) == ["folder"]

    def test_an_error_leaves_the_old_folder(self, tmp_path):
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "old").touch()
        with pytest.raises(RuntimeError), atomic_folder(folder) as scratch:
            (scratch / "half").touch()
            raise RuntimeError
        assert os.listdir(folder) == ["old"] and os.listdir(tmp_path) == ["folder"]

    def test_a_move_that_fails_puts_the_old_folder_back(self, tmp_path):
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "old").touch()
        with pytest.raises(FileNotFoundError):
            replace_folder(tmp_path / "gone", folder)
        assert os.listdir(folder) == ["old"] and os.listdir(tmp_path) == ["folder"]

    def test_a_kill_between_the_two_moves_loses_nothing(self, tmp_path):
        folder, other = tmp_path / "folder[1]", tmp_path / ".folder[1].mine.old"
        other.mkdir()
        for moved in (True, False):
            with atomic_folder(folder) as scratch:
                (scratch / "old").touch()
            with contextlib.ExitStack() as kill:
                kill.enter_context(atomic_folder(folder))
                if moved:
                    folder.rename(tmp_path / ".folder[1].0123abcd.old")
                else:
                    (tmp_path / ".folder[1].0123abcd.old").mkdir()
                kill.pop_all()  # never to end
            with pytest.raises(RuntimeError), atomic_folder(folder, locked=True):
                assert os.listdir(folder) == ["old"]
                raise RuntimeError
            assert os.listdir(folder) == ["old"] and sorted(os.listdir(tmp_path)) == [other.name, folder.name]


# Replaces a folder, and is killed in front of one of the steps that change the disk, or in the middle of deleting.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from transformers_minigpt4.utils import files

folder, step, exchanges = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchange"
steps = 0

def counted(function):
    def call(*arguments, **options):
        global steps
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1
        return function(*arguments, **options)
    return call

def delete(path, ignore_errors):
    for file in sorted(Path(path).glob("*")):
        counted(os.remove)(file)
    if Path(path).exists():
        counted(os.rmdir)(path)

os.replace, shutil.rmtree = counted(os.replace), delete
files._exchange = counted(files._exchange) if exchanges else lambda first, second: False
with files.atomic_folder(folder) as scratch:
    for name in "abc":
        (scratch / name).write_text("new")
print(steps)
"""


def state_of(folder) -> set[str]:
    assert sorted(os.listdir(folder)) == ["a", "b", "c"]
    return {path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("way", ["exchange", "two moves"])
def test_a_kill_at_any_step_leaves_a_complete_folder(tmp_path, way):
    """
    Where the system exchanges folders, under its name at every moment; elsewhere after the next call at the latest.
    """
    seen = []
    for step in range(20):
        folder = tmp_path / str(step) / "folder"
        folder.mkdir(parents=True)
        for name in "abc":
            (folder / name).write_text("old")
        done = subprocess.run([sys.executable, "-c", KILLED, folder, str(step), way], capture_output=True, text=True)
        if way == "exchange":
            seen += state_of(folder)
        with pytest.raises(RuntimeError), atomic_folder(folder, locked=True):
            seen += state_of(folder)
            raise RuntimeError
        assert os.listdir(folder.parent) == ["folder"]
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
    assert step == int(done.stdout) > 4 and set(seen) == {"old", "new"}


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no function of the system exchanges two folders")
def test_a_reader_always_finds_the_folder(tmp_path):
    folder = tmp_path / "folder"
    absent, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            if not (folder / "file").exists():
                absent.append(os.listdir(tmp_path))

    def write(content: str) -> None:
        with atomic_folder(folder) as scratch:
            (scratch / "file").write_text(content)

    write("0")
    reader = threading.Thread(target=look)
    reader.start()
    for number in range(300):
        write(str(number))
    stop.set()
    reader.join()
    assert not absent and os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("at_the_start", ["absent", "empty"])
def test_what_somebody_else_wrote_meanwhile_is_kept(tmp_path, at_the_start):
    folder = tmp_path / "folder"
    if at_the_start == "empty":
        folder.mkdir()
    with pytest.raises(FileExistsError, match="has content now"), atomic_folder(folder, overwrite=False) as scratch:
        (scratch / "mine").touch()
        folder.mkdir(exist_ok=True)
        (folder / "theirs").touch()
    assert os.listdir(folder) == ["theirs"] and os.listdir(tmp_path) == ["folder"]
    (folder / "theirs").unlink()
    with atomic_folder(folder, overwrite=False) as scratch:
        (scratch / "mine").touch()
    assert os.listdir(folder) == ["mine"] and os.listdir(tmp_path) == ["folder"]


class TestJsonLinesWriter:
    def test_records_are_appended(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        for number in range(2):
            with JsonLinesWriter(path) as writer:
                writer.append([{"number": number}, {"text": "ü"}])
        assert [json.loads(line) for line in path.open()] == [
            {"number": 0},
            {"text": "ü"},
            {"number": 1},
            {"text": "ü"},
        ]

    @pytest.mark.parametrize("end", ['{"number": 1', '{"number": 1, "te', "{"])
    def test_a_line_cut_short_is_dropped(self, tmp_path, end):
        path = tmp_path / "lines.jsonl"
        path.write_text('{"number": 0}\n' + end)
        with JsonLinesWriter(path) as writer:
            writer.append([{"number": 2}])
        assert path.read_text() == '{"number": 0}\n{"number": 2}\n'

    def test_a_missing_line_break_is_added(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        path.write_text('{"number": 0}')
        with JsonLinesWriter(path) as writer:
            writer.append([{"number": 1}])
        assert path.read_text() == '{"number": 0}\n{"number": 1}\n'

    def test_a_line_that_is_refused_changes_nothing(self, tmp_path):
        path = tmp_path / "lines.jsonl"
        path.write_text('{"number": 0}\nsomebody else\'s text')

        def check(number, line):
            if not line.startswith(b"{"):
                raise ValueError(f"line {number}")

        with pytest.raises(ValueError, match="line 2"), JsonLinesWriter(path, check, is_cut=lambda line: False):
            pass
        assert path.read_text().endswith("else's text")

    def test_outside_of_a_with_statement(self, tmp_path):
        with pytest.raises(ValueError, match="use JsonLinesWriter in a with statement"):
            JsonLinesWriter(tmp_path / "lines.jsonl").append([])

    def test_names_that_are_no_unicode(self):
        assert to_json({"image": "ü"}) == '{"image": "ü"}'
        assert json.loads(to_json({"image": "\udcff"}).encode()) == {"image": "\udcff"}


HOLDER = """
import os, signal, sys, time
from transformers_minigpt4.utils.files import folder_lock
with folder_lock(sys.argv[1], "taken by {owner}"):
    if os.fork() == 0:  # a data worker, which outlives its killed parent by seconds
        os.write(1, b"worker\\n")  # in one piece
        time.sleep(20)
        os._exit(0)
    os.write(1, b"held\\n")
    time.sleep(60)
"""


class TestFolderLock:
    def test_a_second_holder_is_refused_and_told_of_the_first(self, tmp_path):
        refusal = "taken by {owner}"
        with folder_lock(tmp_path / "run", refusal):
            second = folder_lock(tmp_path / "run", refusal)
            with pytest.raises(RuntimeError, match=f"taken by process {os.getpid()}"), second:
                pass
        with folder_lock(tmp_path / "run", refusal, purpose="repair"):
            second = folder_lock(tmp_path / "run", "{odd} " + refusal, error=KeyError)
            with pytest.raises(KeyError, match=f"{{odd}} taken by repair, process {os.getpid()}"), second:
                pass

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_killed_process_frees_it_although_its_children_live(self, tmp_path):
        with program([sys.executable, "-c", HOLDER, str(tmp_path)], stderr=None) as holder:
            assert {holder.stdout.readline() for _ in range(2)} == {"held\n", "worker\n"}
            second = folder_lock(tmp_path, "taken by {owner}")
            with pytest.raises(RuntimeError, match=f"taken by process {holder.pid}"), second:
                pass
        start = time.monotonic()
        with folder_lock(tmp_path, "taken by {owner}"):
            assert time.monotonic() - start < 10
