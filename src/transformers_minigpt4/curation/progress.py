"""The progress bar that every step of curation shows on stderr."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm


@contextlib.contextmanager
def bar(step: str, total: int | None, done: int = 0, shown: bool = True) -> Iterator[Callable[[int], object]]:
    """
    A bar for a step; the value is called with how many pairs more are done.

    Nothing is drawn where stderr is no terminal.
    """
    disable = None if shown else True
    with tqdm(desc=step, total=total, initial=done, unit="pair", file=sys.stderr, disable=disable) as drawn:
        yield drawn.update
