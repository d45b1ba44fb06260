"""Works on shards with the processes of `torchrun` or `accelerate launch`, or any others that share the folder."""

import os
import time
from collections.abc import Generator, Sequence
from typing import NamedTuple

from .shards import Shard, ShardFolder, ShardJob, ShardResult


_POLL = 2.0  # seconds between looks at shards that others work on


class Rank(NamedTuple):
    """Which process of how many this is."""

    number: int
    total: int


def this_rank(on_cpu: bool = False) -> Rank | None:
    """
    The place of this process among those that `torchrun` or `accelerate launch` started; `None` outside of them.

    Of several GPUs, the process keeps its own one; call this before torch looks for them. The variables that tell
    processes apart leave the environment, because vLLM would take all processes for parts of one model.

    Args:
        on_cpu (`bool`, *optional*, defaults to `False`): whether the process needs no GPU.

    Raises:
        ValueError: for variables that are no numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    texts = [os.environ.get(name, "") for name in names]
    if not texts[0] or not texts[1]:
        return None
    if not all(text.isdecimal() for text in texts if text):
        raise ValueError(f"{', '.join(names)} must be numbers, as torchrun sets them; they are {', '.join(texts)}")
    number, count, local = (int(text or 0) for text in texts)
    if not on_cpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else []
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local % len(gpus)] if gpus else str(local)
    for name in (*names, "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return Rank(number, count)


def finish_shards(shards: Sequence[Shard], job: ShardJob, folder: ShardFolder, rank: Rank) -> Generator[ShardResult]:
    """
    Finish this process's part of the shards, then what others have not begun, until every shard is finished.

    The process waits for shards that others work on and takes them over if those end; were it to end with an error
    before, `torchrun` would end the others.

    Args:
        shards (`Sequence[Shard]`): what is to be done by all processes.
        job (`ShardJob`): how.
        folder (`ShardFolder`): where the files go, and where the processes see what others do.
        rank (`Rank`): which process this is.

    Yields:
        `ShardResult`: one for each shard that this process worked on.

    Raises:
        ValueError: if the model cannot be loaded.
    """
    finish = job.start()
    left = [shard for first in range(rank.total) for shard in shards[(rank.number + first) % rank.total :: rank.total]]
    while left:
        worked = False
        for shard in left:
            with folder.claim(shard.number) as mine:
                if not mine:
                    continue
                worked = True
                result = finish(shard)
                if result.error is not None:
                    folder.note_failure(shard.number, result.error)
            yield result
            if result.fatal:
                return
        done = folder.finished() | folder.failed().keys()
        left = [shard for shard in left if shard.number not in done]
        if left and not worked:
            time.sleep(_POLL)
