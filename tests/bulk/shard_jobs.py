"""A stand-in for describing: jobs that write shards without a model, and a program that runs them."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers_minigpt4.bulk import ranks, ray_run
from transformers_minigpt4.bulk.shards import Shard, ShardFolder, ShardResult, finish_shard, split
from transformers_minigpt4.utils.files import atomic_file, to_json


@dataclass(frozen=True)
class NamingJob:
    """
    Calls each image by its name.

    Attributes:
        folder: where the files go.
        seconds: that each image takes.
        deadly: an image that ends the process.
        unreadable: an image that ends its shard with an error.
        unloadable: what is wrong with the model.
    """

    folder: ShardFolder
    seconds: float = 0
    deadly: str | None = None
    unreadable: str | None = None
    unloadable: str | None = None

    def start(self) -> Callable[[Shard], ShardResult]:
        if self.unloadable:
            raise ValueError(self.unloadable)
        return lambda shard: finish_shard(shard, self.folder, self.write)

    def write(self, shard: Shard, path: Path) -> tuple[int, int]:
        assert shard.images is not None
        with atomic_file(path) as scratch, open(scratch, "w") as file:
            for image in shard.images:
                time.sleep(self.seconds)
                if image == self.deadly:
                    os._exit(1)
                if image == self.unreadable:
                    raise OSError(f"{image} cannot be read")
                file.write(to_json({"image": image, "caption": f"this is {image}"}) + "\n")
        return len(shard.images), 0


def images(count: int) -> list[str]:
    return [f"{number:05d}.png" for number in range(count)]


def prepared(path: Path, count: int, size: int) -> tuple[list[Shard], ShardFolder]:
    """The shards of so many images, and their folder."""
    shards = split(images(count), size)
    folder = ShardFolder(path, len(shards), ".jsonl")
    folder.prepare({"model": "stand-in"})
    return shards, folder


def captions(folder: Path) -> Counter:
    """How often each image has a caption."""
    return Counter(json.loads(line)["image"] for path in folder.glob("*.jsonl") for line in path.open())


def environment(**more: str) -> dict[str, str]:
    """That of a program that imports the helpers of these tests."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **more}


def main() -> None:
    """`python -m shard_jobs ray|ranks FOLDER IMAGES SIZE SECONDS`: does what is missing, with two workers."""
    how, path, count, size, seconds = sys.argv[1:]
    shards, folder = prepared(Path(path), int(count), int(size))
    done = folder.finished()
    left = [shard for shard in shards if shard.number not in done]
    job = NamingJob(folder, float(seconds))
    rank = ranks.this_rank() if how == "ranks" else None
    results = ray_run.finish_shards(left, job, 2) if rank is None else ranks.finish_shards(left, job, folder, rank)
    for result in results:
        print(os.getpid(), result.number, flush=True)


if __name__ == "__main__":
    from shard_jobs import main as importable  # Ray's workers know nothing of this program's `__main__`

    importable()
