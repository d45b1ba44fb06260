"""A deadline over a complete exchange with a server."""

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar


Result = TypeVar("Result")

# By process, because threads do not survive a fork.
_event_loops: dict[int, asyncio.AbstractEventLoop] = {}


def run_within(seconds: float | None, exchange: Coroutine[Any, Any, Result]) -> Result:
    """
    Runs a coroutine to its end, or cancels it when its time is over.

    The time-outs of HTTP clients are for each single read, so that a server which sends one byte now and then keeps
    them waiting for ever. Only a cancelled coroutine gives up in the middle of a look-up, connection, header or body.

    All coroutines run in one event loop, in a thread of this process; clients may therefore be kept between calls.
    This function may be called in any other thread, also where an event loop runs already, as in notebooks.

    Args:
        seconds (`float`, *optional*): How long it may take; `None` for as long as it wants.
        exchange (`Coroutine`): What to run.

    Returns:
        What the coroutine returns; its exceptions are passed on.

    Raises:
        TimeoutError: if it took too long.
    """
    running = asyncio.run_coroutine_threadsafe(asyncio.wait_for(exchange, seconds), _event_loop(os.getpid()))
    try:
        return running.result()
    finally:
        running.cancel()  # if this thread was interrupted


def _event_loop(process_id: int) -> asyncio.AbstractEventLoop:
    if process_id not in _event_loops:
        loop = asyncio.new_event_loop()
        # Of threads that come here at the same time, one is first.
        if _event_loops.setdefault(process_id, loop) is loop:
            threading.Thread(target=loop.run_forever, name="exchanges", daemon=True).start()
        else:
            loop.close()
    return _event_loops[process_id]
