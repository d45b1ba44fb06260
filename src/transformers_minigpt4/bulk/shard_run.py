"""Describes the images of sources shard by shard: in this process, in those of `torchrun`, or in Ray's."""

import hashlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers_minigpt4.inference.engines import Engine, EngineName
from transformers_minigpt4.inference.loading import Quantization, load_engine
from transformers_minigpt4.utils.files import file_lock

from . import ranks, ray_run
from .images import BulkImage, describe_images
from .shards import MANIFEST, Shard, ShardFolder, ShardResult, finish_shard, split
from .sinks import Sink, write_shard
from .sources import SourceShard


@dataclass(frozen=True)
class EngineSettings:
    """What [`~inference.loading.load_engine`] loads in each process that works."""

    name: EngineName
    checkpoint: str
    batch_size: int | None = None
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    quantization: Quantization | None = None

    def load(self) -> Engine:
        """
        Loads the model.

        Raises:
            ValueError: as of [`~inference.loading.load_engine`].
        """
        return load_engine(
            self.name,
            self.checkpoint,
            batch_size=self.batch_size,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            quantization=self.quantization,
        )


@dataclass(frozen=True)
class DescribeJob:
    """
    Describes the images of shards; see [`~bulk.shards.ShardJob`].

    Attributes:
        folder: where the files go.
        sink: their format.
        sources: the shards that the sources have by themselves, which are the last ones.
        engine: the model.
        prompt: the question about each image.
        settings: of `generate`.
    """

    folder: ShardFolder
    sink: Sink
    sources: Sequence[SourceShard]
    engine: EngineSettings
    prompt: str
    settings: Mapping[str, Any]

    def start(self) -> Callable[[Shard], ShardResult]:
        """See [`~bulk.shards.ShardJob`]."""
        write = partial(self._write, self.engine.load())
        return lambda shard: finish_shard(shard, self.folder, write)

    def _write(self, engine: Engine, shard: Shard, path: Path) -> tuple[int, int]:
        described = describe_images(
            self._images(shard),
            engine,
            prompt=self.prompt,
            keep_content=self.sink.keeps_images,
            **self.settings,
        )
        return write_shard(path, self.sink, described)

    def _images(self, shard: Shard) -> Iterator[BulkImage]:
        if shard.images is None:
            return self.sources[shard.number - self.folder.count].images()
        return (BulkImage(image, image) for image in shard.images)


class ShardRun:
    """
    A folder of captions that this run completes.

    Args:
        output (`str` or `os.PathLike`): the folder.
        sink (`Sink`): the format of its files.
        files (`Sequence[str]`): images that are files and URLs.
        sources (`Sequence[SourceShard]`): shards that sources have by themselves.
        engine (`EngineSettings`), prompt (`str`): what is asked.
        shard_size (`int`): files and URLs per shard.
        settings (`Mapping[str, object]`): of `generate`.

    Raises:
        ValueError: for a folder of other images, another prompt or model, or with other content.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        sink: Sink,
        files: Sequence[str],
        sources: Sequence[SourceShard],
        engine: EngineSettings,
        prompt: str,
        shard_size: int,
        settings: Mapping[str, Any],
    ) -> None:
        shards = split(files, shard_size)
        shards += [Shard(number, source.name) for number, source in enumerate(sources, start=len(shards))]
        self.folder = ShardFolder(output, len(shards), sink.suffix)
        self.folder.prepare(
            {
                "model": engine.checkpoint,
                "prompt": prompt,
                "generation settings": dict(settings),
                "shard size": shard_size,
                "images": _images_as_text(files, sources),
            }
        )
        self.shards = {shard.number: shard for shard in shards}
        done = self.folder.finished()
        self.left = [shard for shard in shards if shard.number not in done]
        self.job = DescribeJob(self.folder, sink, sources, engine, prompt, settings)

    def results(self, rank: ranks.Rank | None = None) -> Generator[ShardResult]:
        """What becomes of the shards that are left, in this process, which may be one of several."""
        return ranks.finish_shards(self.left, self.job, self.folder, rank or ranks.Rank(0, 1))

    def results_of_ray(self, workers: int | None) -> Generator[ShardResult]:
        """
        What becomes of the shards that are left, with Ray.

        Raises:
            ValueError: for a device that workers cannot share.
            InUseError: if another such run writes to the folder.
        """
        device = self.job.engine.device
        if device not in (None, "cpu", "cuda", "auto"):
            raise ValueError(f"each worker gets a device of its own, so it cannot be {device!r}; leave --device out")
        path = self.folder.path
        refusal = f"another run ({{owner}}) writes to {str(path)!r}; wait for it, or choose another --output"
        with file_lock(path / MANIFEST, refusal):
            yield from ray_run.finish_shards(self.left, self.job, workers, on_cpu=device == "cpu")


def _images_as_text(files: Sequence[str], sources: Sequence[SourceShard]) -> str:
    """Says of images how many they are, and whether they are the same; a shard may be repaired in between."""
    digest = hashlib.sha256()
    for name in (*files, "", *(source.name for source in sources)):
        digest.update(os.fsencode(name) + b"\0")
    counts = [f"{len(files):,} files"] if files else []
    counts += [f"{len(sources):,} shards"] if sources else []
    return f"{' and '.join(counts)} with the hash {digest.hexdigest()[:12]}"
