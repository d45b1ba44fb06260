"""
Ctrl-C from the first import of the `minigpt4` command to its last line: one line on stderr, and exit status 130.

Light on purpose: the package imports it before anything else.
"""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType


INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
Message = str | Callable[[], str]


class _State:
    """What the handler knows of this process."""

    process: int | None = None  # forked ones inherit the handler, and must not speak for the command
    messages: tuple[Message, ...] = ()  # of the blocks that are left by an exception, innermost last
    pressed = False
    status: int | None = None  # of a command that is complete


def is_command() -> bool:
    """Whether this process is the `minigpt4` command, rather than another program that imports the package."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    as_module = ("-m", "transformers_minigpt4.cli") in zip(sys.orig_argv, sys.orig_argv[1:])
    return as_module or name in ("minigpt4", "minigpt4.exe")


def handle_interrupts() -> None:
    """
    Ends this process at Ctrl-C from now on, without the trace of whatever is being imported.

    Within [`stoppable`] it raises `KeyboardInterrupt`, so that what is half-written is removed; at the second Ctrl-C
    the process ends at once there, too. Ctrl-C stays ignored where the process was started so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _State.process = os.getpid()
        signal.signal(signal.SIGINT, _on_interrupt)


def finish(status: int) -> None:
    """Notes that the command is complete: Ctrl-C then only shortens the end of the process."""
    _State.status = status


@contextlib.contextmanager
def stoppable(message: Message) -> Iterator[None]:
    """A block that Ctrl-C leaves by `KeyboardInterrupt`; `message` is for a second one during that."""
    outer = _State.messages
    _State.messages = (*outer, message)
    try:
        yield
    finally:
        _State.messages = outer


@contextlib.contextmanager
def raising_interrupts() -> Iterator[None]:
    """A block in which every Ctrl-C raises `KeyboardInterrupt`, the second one too: Ctrl-C does not end it."""
    if signal.getsignal(signal.SIGINT) is not _on_interrupt:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _on_interrupt)


def text_of(message: Message) -> str:
    """The text of a message."""
    return message if isinstance(message, str) else message()


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _State.process or (_State.messages and not _State.pressed):
        _State.pressed = True
        raise KeyboardInterrupt
    if _State.status is not None:
        os._exit(_State.status)
    start = shlex.join(["minigpt4", *sys.argv[1:]])
    message = _State.messages[-1] if _State.messages else f"stopped before it began; `{start}` starts it"
    with contextlib.suppress(Exception):
        line = f"minigpt4: {text_of(message)}\n"
        os.write(2, line.encode("utf-8", "backslashreplace"))  # sys.stderr may be in the middle of a line
    os._exit(INTERRUPTED)
