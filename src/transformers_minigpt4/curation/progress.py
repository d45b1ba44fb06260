"""The progress bar that every step of curation shows on stderr."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm


@contextlib.contextmanager
def bar(step: str, total: int | None, done: int = 0, shown: bool = True) -> Iterator[Callable[[int], object]]:
    """
    A bar for a step; yields a function to call with the number of pairs that have been done since.

    Nothing is shown if stderr is not a terminal.
    """
    disable = None if shown else True
    with tqdm(desc=step, total=total, initial=done, unit="pair", file=sys.stderr, disable=disable) as shown_bar:
        yield shown_bar.update
