"""Starts the programs that tests talk to, interrupt or kill."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def program(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """
    Starts a program with text pipes for its output, and ends it with the `with` statement.

    SIGINT reaches it although this process may ignore it, as under `trap '' INT; pytest`: programs inherit an ignored
    signal, but not a handler.

    Args:
        command: The program and its arguments.
        options: Further arguments of `subprocess.Popen`.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, **{**pipes, **options})
    finally:
        signal.signal(signal.SIGINT, earlier)
    with process:
        try:
            yield process
        finally:
            process.kill()
