"""Ray: what becomes of shards when workers, machines or the command are lost."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_jobs import NamingJob, captions, environment, images, prepared

from transformers_minigpt4.bulk import ray_run


pytestmark = pytest.mark.slow
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A home for Ray's token and logs; its path is short, because Ray's Unix sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    variables = {"HOME": str(folder), "RAY_TMPDIR": str(folder), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(home):
    """A cluster of machines, all of which are this one; the first has no CPU for workers."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "node_ip_address": "127.0.0.1"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        yield cluster
    cluster.shutdown()


def add_machines(cluster, count: int) -> list:
    return [cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1") for _ in range(count)]


def test_a_lost_machine_and_a_deadly_image(cluster, tmp_path):
    machines = add_machines(cluster, 2)
    shards, folder = prepared(tmp_path / "out", 120, 10)
    results = ray_run.finish_shards(shards, NamingJob(folder, 0.05, deadly="00033.png"))
    got = [next(results)]
    cluster.remove_node(machines[0], allow_graceful=False)
    add_machines(cluster, 1)
    got += results
    errors = {result.number: result.error for result in got if result.error}
    assert errors == {3: "3 processes died while they worked on it"}
    assert sorted(result.number for result in got) == list(range(12))
    assert captions(folder.path) == Counter(images(30) + images(120)[40:])


def test_ten_thousand_images_each_once(cluster, tmp_path):
    shards, folder = prepared(tmp_path / "out", 10_000, 100)
    results = list(ray_run.finish_shards(shards, NamingJob(folder)))
    assert sum(result.described for result in results) == 10_000
    assert captions(folder.path) == Counter(images(10_000))


def test_a_model_that_does_not_load_is_one_error(cluster, tmp_path):
    shards, folder = prepared(tmp_path / "out", 2, 1)
    results = ray_run.finish_shards(shards, NamingJob(folder, unloadable="cannot load 'x'"))
    result = next(results)
    results.close()
    assert (result.error, result.fatal) == ("cannot load 'x'", True)


def test_an_address_without_ray_is_one_error(home, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    shards, folder = prepared(tmp_path / "out", 2, 1)
    with pytest.raises(ValueError, match=r"cannot reach Ray at RAY_ADDRESS=127\.0\.0\.1:9"):
        list(ray_run.finish_shards(shards, NamingJob(folder)))
