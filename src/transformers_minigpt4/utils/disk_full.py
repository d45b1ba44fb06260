"""Recognizes a full disk, of which libraries have several errors, and names the path that was being written."""

import contextlib
import errno
import os
from collections.abc import Iterator


_NUMBERS = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quotas by that name
# In the words of the system, safetensors (Rust) and SQLite.
_WORDS = ("No space left on device", "os error 28", "database or disk is full", "Disk quota exceeded")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no space left."""
    return getattr(error, "errno", None) in _NUMBERS or any(words in str(error) for words in _WORDS)


@contextlib.contextmanager
def naming_path(path: str | os.PathLike[str]) -> Iterator[None]:
    """
    Gives the error of a full disk the path that was being written, which neither the system nor libraries name.

    Raises:
        OSError: with `filename`, for any error that says so.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path)) from error
