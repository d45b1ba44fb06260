"""Ray: what it listens on, and what becomes of shards when workers, machines or the command are lost."""

import contextlib
import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import program
from shard_jobs import NamingJob, captions, environment, images, prepared
from tiny_models import drawn_image

from transformers_minigpt4.bulk import ray_run
from transformers_minigpt4.inference.describe import describe
from transformers_minigpt4.inference.loading import load_engine


pytestmark = pytest.mark.slow
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[Path]:
    """A home for Ray's token and logs; its path is short, because Ray's Unix sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    variables = {"HOME": str(folder), "RAY_TMPDIR": str(folder), "PYTHONPATH": environment()["PYTHONPATH"]}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def machines(home):
    """A cluster of machines, all of which are this one; the first has no CPU for workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # before Ray is imported: all on the loopback address
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "node_ip_address": "127.0.0.1"})
        yield cluster
        cluster.shutdown()


@pytest.fixture
def cluster(machines, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", machines.address)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    return machines


def add_machines(cluster, count: int) -> list:
    return [cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1") for _ in range(count)]


def ray_processes(of: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(of).children(recursive=True)
    return []


def wait_for_files(folder: Path, count: int, process) -> None:
    while len(list(folder.glob("*.jsonl"))) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)


def wait_for_end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not alive


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder of images, one of which is broken, and three tar files, one of which is cut short."""
    folder = tmp_path_factory.mktemp("sources")
    photos = folder / "photos"
    photos.mkdir()
    for number in range(60):
        drawn_image(number).save(photos / f"{number:02d}.png")
    for number in range(3):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for image in range(5 * number, 5 * number + 5):
                tar.add(photos / f"{image:02d}.png", f"{image:02d}.png")
    (photos / "33.png").write_bytes(b"no image")
    cut = folder / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:2500])
    return folder


def test_ctrl_c_and_a_second_run_with_two_workers(sources, tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    command = ["minigpt4", "describe", str(sources / "photos"), f"wds:{sources}/{{00000..00002}}.tar"]
    command += ["--model", tiny_checkpoint, "--output", f"jsonl:{output}", "--ray-workers", "2"]
    command += ["--shard-size", "5", "--max-new-tokens", "8"]
    start = [sys.executable, "-m", "transformers_minigpt4.cli", *command[1:]]
    with program(start, start_new_session=True) as process:
        wait_for_files(output, 1, process)
        begun = ray_processes(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, message = process.communicate(timeout=120)
    assert process.returncode == 130
    assert " of 15 shards, now in " in message and f"{' '.join(command[:3])} " in message and "resumes" in message
    assert len(message.splitlines()) == 1
    assert len(begun) > 4
    wait_for_end(begun)
    assert 0 < len(captions(output)) < 69

    addresses: set[str] = set()
    with program(start) as process:
        while process.poll() is None:
            for one in [psutil.Process(process.pid), *ray_processes(process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    sockets = one.net_connections("inet")
                    addresses |= {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
            time.sleep(0.2)
        printed, message = process.communicate()
    assert process.returncode == 1
    assert addresses and addresses <= LOOPBACK
    assert printed == ""
    assert "00001.tar cannot be read to its end" in message and "; 1 shard is not finished" in message
    failed = [json.loads(line) for path in output.glob(".*.errors") for line in path.open()]
    assert [Path(record["image"]).name for record in failed] == ["33.png"]

    photos = [str(sources / "photos" / f"{number:02d}.png") for number in range(60) if number != 33]
    tars = [f"{sources}/0000{number // 5}.tar/{number:02d}" for number in (*range(5), *range(10, 15))]
    assert captions(output) == Counter(photos + tars)
    records = [json.loads(line) for path in output.glob("*.jsonl") for line in path.open()]
    found = {record["image"]: record["caption"] for record in records}
    engine = load_engine("transformers", tiny_checkpoint)
    for record in describe(photos[:10], engine, do_sample=False, max_new_tokens=8):
        assert found[record["image"]] == record["caption"]


def test_killed_workers_and_a_killed_command(tmp_path):
    output = tmp_path / "out"
    start = [sys.executable, "-m", "shard_jobs", "ray", str(output), "400", "10"]
    with program([*start, "0.05"]) as process:
        wait_for_files(output, 1, process)
        worker = next(one for one in ray_processes(process.pid) if "MapWorker" in " ".join(one.cmdline()))
        worker.kill()
        killed_at = len(list(output.glob("*.jsonl")))
        wait_for_files(output, killed_at + 6, process)
        left = [one for one in ray_processes(process.pid) if "MapWorker" in " ".join(one.cmdline())]
        assert left
        process.kill()
    wait_for_end(left)
    begun = captions(output)
    assert 0 < len(begun) < 400 and set(begun.values()) == {1}
    with program([*start, "0"]) as process:
        printed, message = process.communicate(timeout=120)
    assert process.returncode == 0, message
    assert len(printed.splitlines()) == 40 - len(begun) // 10
    assert captions(output) == Counter(images(400))
    assert len(list(output.iterdir())) == 41  # and the manifest


def test_a_lost_machine_and_a_deadly_image(cluster, tmp_path):
    first, _ = add_machines(cluster, 2)
    shards, folder = prepared(tmp_path / "out", 120, 10)
    results = ray_run.finish_shards(shards, NamingJob(folder, 0.05, deadly="00033.png"))
    got = [next(results)]
    cluster.remove_node(first, allow_graceful=False)
    add_machines(cluster, 1)
    got += results
    errors = {result.number: result.error for result in got if result.error}
    assert errors == {3: "3 processes died while they worked on it"}
    assert sorted(result.number for result in got) == list(range(12))
    assert captions(folder.path) == Counter(images(30) + images(120)[40:])


def test_ten_thousand_images_each_once(cluster, tmp_path):
    add_machines(cluster, 2 - len(cluster.worker_nodes))
    shards, folder = prepared(tmp_path / "out", 10_000, 100)
    results = list(ray_run.finish_shards(shards, NamingJob(folder)))
    assert sum(result.described for result in results) == 10_000
    assert captions(folder.path) == Counter(images(10_000))


def test_a_model_that_does_not_load_is_one_error(cluster, tmp_path):
    add_machines(cluster, 2 - len(cluster.worker_nodes))
    shards, folder = prepared(tmp_path / "out", 2, 1)
    results = ray_run.finish_shards(shards, NamingJob(folder, unloadable="cannot load 'x'"))
    result = next(results)
    results.close()
    assert (result.error, result.fatal) == ("cannot load 'x'", True)


def test_an_address_without_ray_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    shards, folder = prepared(tmp_path / "out", 2, 1)
    with pytest.raises(ValueError, match=r"cannot reach Ray at RAY_ADDRESS=127\.0\.0\.1:9"):
        list(ray_run.finish_shards(shards, NamingJob(folder)))
