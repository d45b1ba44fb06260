"""
Works on shards with Ray: on this machine, or on the cluster that `RAY_ADDRESS` names.

Ray Data keeps a pool of actors, each of which loads the model once. A block of its dataset is the number of one shard;
the actor writes the shard's file itself and returns a few counts, so images and captions never pass through Ray's
object store. Ray restarts actors that die, also on other nodes, and gives their shard to another one.
"""

import contextlib
import json
import logging
import math
import os
import socket
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from transformers_minigpt4.utils.text import first_line

from .shards import Shard, ShardJob, ShardResult


MAX_DEATHS = 3  # of workers that load the model, one after the other
# Rows of numbers hardly need Ray's object store, which takes 30 % of the memory by default, and 75 MB at least.
_OBJECT_STORE_BYTES = 128 * 2**20


class _Pool(NamedTuple):
    """How many actors there are, and what each one reserves."""

    workers: int
    num_cpus: int
    num_gpus: float


class _Worker:
    """The actor: the model, and what finishes one shard after the other."""

    def __init__(self, job: ShardJob) -> None:
        self.error: str | None = None
        try:
            self.finish = job.start()
        except (ValueError, OSError, RuntimeError) as error:
            # An error here would end the run with Ray's trace, and only after every other actor was tried.
            self.error = f"{error}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        results = [self._finish(Shard(*json.loads(shard))) for shard in batch["shard"]]
        return {"result": [json.dumps(asdict(result)) for result in results]}

    def _finish(self, shard: Shard) -> ShardResult:
        if self.error is not None:
            return ShardResult(shard.number, error=self.error, fatal=True)
        return self.finish(shard)


def finish_shards(
    shards: Sequence[Shard], job: ShardJob, workers: int | None = None, on_cpu: bool = False
) -> Generator[ShardResult]:
    """
    Finish shards with Ray, in any order.

    Without `RAY_ADDRESS` Ray is started for this run, listens on the loopback address only, has no dashboard, sends no
    usage statistics and ends with the run.

    Args:
        shards (`Sequence[Shard]`): what is to be done.
        job (`ShardJob`): how.
        workers (`int`, *optional*): models at work at the same time; by default one per GPU, and without GPUs one per
            machine.
        on_cpu (`bool`, *optional*, defaults to `False`): whether the model stays off the GPUs.

    Yields:
        `ShardResult`: one per shard. A shard whose workers died has an error that says so.

    Raises:
        ValueError: if Ray is not installed, does not start or cannot be reached.
    """
    ray = _import_ray()
    with _started(ray, workers):
        left = {shard.number for shard in shards}
        for result in _results(shards, job, _pool(ray, workers, on_cpu)):
            if result.number in left:  # Ray repeats a task whose result was lost with its machine
                left.remove(result.number)
                yield result
        for number in sorted(left):
            yield ShardResult(number, error="Ray lost it; run the command again")


def _results(shards: Sequence[Shard], job: ShardJob, pool: _Pool) -> Generator[ShardResult]:
    from ray.data import ActorPoolStrategy, DataContext, from_items

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)  # the file in the session's folder has everything
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1
    context.max_consecutive_actor_init_deaths = MAX_DEATHS
    context.execution_no_progress_timeout_s = -1  # a shard may take hours
    with DataContext.current(context):
        rows = from_items([{"shard": json.dumps(shard)} for shard in shards], override_num_blocks=len(shards))
        results = rows.map_batches(
            _Worker,
            fn_constructor_args=(job,),
            batch_size=1,
            # By default Ray restarts actors and repeats their tasks without end; `finish_shard` counts attempts.
            # One task at a time: a second one would wait behind a slow shard while another actor is idle.
            compute=ActorPoolStrategy(size=pool.workers, max_tasks_in_flight_per_actor=1),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
        )
        for row in results.iter_rows():
            yield ShardResult(**json.loads(row["result"]))


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # or Ray Data's actors warn of how it starts them
    if not os.environ.get("RAY_ADDRESS"):
        # Ray replaces 127.0.0.1 by the machine's address and listens on all interfaces, unless it takes clusters for
        # impossible, as on macOS and Windows. It reads this when it is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            'Ray is not installed: pip install "transformers_minigpt4[ray]"; or leave --ray-workers '
            "out and start the command with torchrun"
        ) from error
    return ray


@contextlib.contextmanager
def _started(ray: Any, workers: int | None) -> Iterator[None]:
    """
    A connection to Ray, which is started here unless `RAY_ADDRESS` or this program's own `ray.init` says otherwise.

    Raises:
        ValueError: if that fails, or Ray would listen to other machines.
    """
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    try:
        with _muted():
            if address:
                _check_connection(address)
                ray.init(**quiet)
            else:
                ray.init(
                    "local",
                    _node_ip_address="127.0.0.1",
                    include_dashboard=False,
                    num_cpus=max(os.cpu_count() or 1, workers or 1),
                    object_store_memory=_OBJECT_STORE_BYTES,
                    **quiet,
                )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        ray.shutdown()
        what = f"reach Ray at RAY_ADDRESS={address}" if address else "start Ray"
        raise ValueError(f"cannot {what}: {first_line(error)}") from error
    try:
        if not address and ray.util.get_node_ip_address() != "127.0.0.1":
            raise ValueError(
                "Ray was imported before and would listen to other machines; set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 "
                "before it is imported, or call ray.init yourself"
            )
        yield
    finally:
        ray.shutdown()


def _check_connection(address: str) -> None:
    """
    Ray tries for ten minutes to reach an address where nobody answers.

    Raises:
        OSError: if nobody does.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "//" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Keeps the line in which Ray's C++ part announces its log level off the screen."""
    real = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(real, 2)
        os.close(real)


def _pool(ray: Any, workers: int | None, on_cpu: bool) -> _Pool:
    """
    One actor per GPU, or where there is none, one per machine with all of its cores.

    Raises:
        ValueError: if there is no machine to work on.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        raise ValueError("the Ray cluster has no machine with a CPU; add one and run the command again")
    gpus = 0 if on_cpu else sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus:
        workers = workers or gpus
        return _Pool(workers, 1, 1 / math.ceil(workers / gpus))
    workers = workers or len(nodes)
    # Ray sets OMP_NUM_THREADS to the CPUs that an actor reserves.
    smallest = min(int(node["CPU"]) for node in nodes)
    return _Pool(workers, max(1, smallest // math.ceil(workers / len(nodes))), 0)
