"""Folders of shards: what is written, when, and what a second run or a second process does."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from datasets import load_dataset
from processes import program
from shard_jobs import NamingJob, captions, environment, images, prepared

from transformers_minigpt4.bulk.ranks import Rank, finish_shards, this_rank
from transformers_minigpt4.bulk.shards import MANIFEST, ShardFolder, split


def test_a_shard_becomes_one_file_that_datasets_reads(tmp_path):
    shards, folder = prepared(tmp_path / "out", 25, 10)
    job = NamingJob(folder)
    assert [len(shard.images) for shard in shards] == [10, 10, 5]
    results = [job.start()(shard) for shard in shards]
    assert [(result.described, result.failed, result.error) for result in results] == [(10, 0, None)] * 2 + [
        (5, 0, None)
    ]
    assert sorted(path.name for path in folder.path.iterdir()) == [
        MANIFEST,
        *(f"captions-0000{number}-of-00003.jsonl" for number in range(3)),
    ]
    read = load_dataset(str(folder.path), split="train", cache_dir=str(tmp_path / "cache"))
    assert read["image"] == images(25)


def test_what_fails_leaves_no_file_and_takes_nobody_with_it(tmp_path):
    shards, folder = prepared(tmp_path / "out", 20, 10)
    finish = NamingJob(folder, unreadable="00003.png").start()
    results = [finish(shard) for shard in shards]
    assert [result.error for result in results] == ["00003.png cannot be read", None]
    assert captions(folder.path) == Counter(images(20)[10:])
    assert len(list(folder.path.iterdir())) == 2  # the manifest, and one file


def test_a_finished_shard_is_left_alone_and_leftovers_of_killed_processes_go(tmp_path):
    shards, folder = prepared(tmp_path / "out", 20, 10)
    folder.file(0).write_text("mine\n")
    leftover = folder.path / f".{folder.file(1).name}.0123abcd.tmp"
    leftover.write_text("half")
    finish = NamingJob(folder).start()
    assert [finish(shard).described for shard in shards] == [0, 10]
    assert folder.file(0).read_text() == "mine\n"
    assert not leftover.exists()
    assert folder.finished() == {0, 1}


def test_a_shard_that_kills_three_processes_is_given_up_until_the_next_run(tmp_path):
    shards, folder = prepared(tmp_path / "out", 2, 1)
    job = NamingJob(folder)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), folder.attempt(0) as attempts:
            raise KeyboardInterrupt
        assert attempts == 1  # only a process that dies leaves a trace
    note = folder.path / f".{folder.file(0).name}.attempts"
    note.write_bytes(b"...")
    assert job.start()(shards[0]).error == "3 processes died while they worked on it"
    note.write_bytes(b"...")
    folder.prepare({"model": "stand-in"})
    assert job.start()(shards[0]).described == 1


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        (
            {"model": "other"},
            2,
            'was made with model "stand-in", but this run has model "other"; use the same or choose',
        ),
        ({"model": "stand-in"}, 3, "was made with shards 2, but this run has shards 3"),
    ],
)
def test_another_run_is_refused(tmp_path, settings, count, message):
    prepared(tmp_path / "out", 2, 1)
    with pytest.raises(ValueError, match=message):
        ShardFolder(tmp_path / "out", count, ".jsonl").prepare(settings)


def test_folders_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"holds 'a.jpg', but no shards of an earlier run"):
        ShardFolder(tmp_path / "photos", 1, ".jsonl").prepare({})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="it is not a folder"):
        ShardFolder(tmp_path / "file", 1, ".jsonl").prepare({})
    folder = ShardFolder(tmp_path / "out", 1, ".jsonl")
    folder.prepare({})
    (folder.path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        folder.prepare({})


def test_processes_that_share_a_folder_take_different_shards(tmp_path):
    _, folder = prepared(tmp_path / "out", 3, 1)
    with folder.claim(0) as first, folder.claim(0) as second, folder.claim(1) as other:
        assert (first, second, other) == (True, False, True)
    with folder.claim(0) as again:
        assert again  # it was not finished
        folder.file(0).touch()
    with folder.claim(0) as finished:
        assert not finished
    folder.note_failure(1, "broken")
    with folder.claim(1) as failed:
        assert not failed
    assert folder.failed() == {1: "broken"}
    assert not list(folder.path.glob(f".{folder.file(0).name}.lock"))


def test_one_process_does_the_part_of_others_that_ended(tmp_path):
    shards, folder = prepared(tmp_path / "out", 30, 10)
    job = NamingJob(folder, unreadable="00005.png")
    results = list(finish_shards(shards, job, folder, Rank(1, 2)))
    assert [result.number for result in results] == [1, 0, 2]
    assert folder.failed() == {0: "00005.png cannot be read"}
    assert list(finish_shards(shards, job, folder, Rank(0, 2))) == []


@pytest.mark.parametrize(
    ("variables", "visible"),
    [({}, "3"), ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "7"), ({"CUDA_VISIBLE_DEVICES": "9"}, "9")],
)
def test_a_rank_keeps_one_gpu(monkeypatch, variables, visible):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "MASTER_ADDR": "a", **variables}.items():
        monkeypatch.setenv(name, value)
    assert this_rank() == Rank(11, 16)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} & os.environ.keys()
    assert this_rank() is None


def test_ranks_are_numbers(monkeypatch):
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="must be numbers, as torchrun sets them"):
        this_rank()


@pytest.mark.slow
def test_torchrun_does_each_image_once_and_a_killed_process_is_replaced(tmp_path):
    count = 200
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "shard_jobs"]
    command = [*torchrun, "ranks", str(tmp_path / "out"), str(count), "10", "0.05"]
    with program(command, env=environment()) as process:
        first = process.stdout.readline().split()
        os.kill(int(first[0]), 9)
        process.communicate(timeout=120)
        assert process.returncode != 0  # torchrun ends the others too
    begun = captions(tmp_path / "out")
    assert 0 < len(begun) < count
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len({line.split()[0] for line in done.stdout.splitlines()}) == 2
    assert captions(tmp_path / "out") == Counter(images(count))
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix in (".tmp", ".lock")]


def test_a_list_is_split_without_loss():
    assert [image for shard in split(images(7), 3) for image in shard.images] == images(7)
    assert [shard.number for shard in split(images(7), 3)] == [0, 1, 2]
