"""Loads the next batch in threads while the caller works on this one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar


Item = TypeVar("Item")
Loaded = TypeVar("Loaded")

MAX_THREADS = 16


def load_ahead(
    batches: Iterable[list[Item]], load: Callable[[Item], Loaded], threads: int = MAX_THREADS
) -> Iterator[list[tuple[Item, Loaded]]]:
    """
    Loads every item of every batch, one batch ahead of the caller.

    Args:
        batches (`Iterable[list]`): May be endless; at most two batches are taken ahead of need.
        load (`Callable`): Called in threads; an error that it raises is raised here.
        threads (`int`, *optional*, defaults to 16): Loads at the same time.

    Yields:
        `list[tuple]`: For each batch, its items with what `load` returned for them.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="load-ahead")
    waiting: deque[list[tuple[Item, Future[Loaded]]]] = deque()
    try:
        for batch in batches:
            waiting.append([(item, pool.submit(load, item)) for item in batch])
            if len(waiting) > 1:
                yield [(item, future.result()) for item, future in waiting.popleft()]
        while waiting:
            yield [(item, future.result()) for item, future in waiting.popleft()]
    finally:
        # A consumer that stops early must not wait for downloads that nobody will read.
        pool.shutdown(wait=False, cancel_futures=True)
