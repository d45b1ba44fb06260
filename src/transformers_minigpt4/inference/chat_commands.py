"""The `chat` subcommand of `minigpt4`."""

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from transformers_minigpt4.utils.command_line import (
    Device,
    DType,
    Quantization,
    TrustRemoteCode,
    complain,
    echo,
)
from transformers_minigpt4.utils.interrupts import raising_interrupts


if TYPE_CHECKING:
    from .chat_session import ChatSession


def chat(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Folder or Hub id of an image-text-to-text model. By default the latest model of `minigpt4 demo`.",
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="PATH", help="Image for the first question, file or URL; may be repeated."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message, in place of the chat template's own.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum length of an answer, in tokens. By default the checkpoint's setting, else 300."
        ),
    ] = None,
    greedy: Annotated[
        bool,
        typer.Option("--greedy", help="Always take the likeliest token. By default sample as the authors' chat does."),
    ] = False,
    dtype: DType = "auto",
    device: Device = None,
    quantization: Quantization = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Talk about images.

    Answers appear word by word. /image PATH gives an image with the next question, in any turn; /help lists the other
    commands. Ctrl-C stops an answer, Ctrl-D leaves. Questions piped to standard input, one per line, are answered in
    order, and only the answers are written to standard output.

    Examples:
        minigpt4 chat
        minigpt4 chat my-checkpoint --image photo.jpg
    """
    from transformers_minigpt4.processing.image_utils_minigpt4 import load_image

    from .chat import PRESETS, Chat
    from .chat_session import ChatSession
    from .demo_checkpoint import demo_checkpoint, knows_drawn_shapes_only
    from .loading import load_model_and_processor

    waiting = [load_image(image) for image in images or ()]
    checkpoint = checkpoint or demo_checkpoint()
    if knows_drawn_shapes_only(checkpoint):
        complain("this is the demo's model, which knows drawn shapes only; name another one for photographs")
    interactive = sys.stdin.isatty()
    parameters = dict(PRESETS["greedy" if greedy else "authors"])
    if max_new_tokens is not None:
        parameters["max_new_tokens"] = max_new_tokens
    model, processor = load_model_and_processor(checkpoint, dtype, device, trust_remote_code, quantization)
    session = ChatSession(
        Chat(model, processor, system, parameters, read_ahead=False),
        show=lambda text: echo(text, nl=False),
        note=lambda text: echo(text, err=True),
        prepare=interactive,
    )
    session.images = waiting
    if interactive:
        _converse(session, checkpoint)
    else:
        _answer_lines(session)


def _answer_lines(session: "ChatSession") -> None:
    """Answers what standard input asks."""
    asked = False
    for line in sys.stdin:
        asked = asked or bool(line.strip())
        if not session.enter(line):
            return
    if not asked:
        raise ValueError("standard input has no question; pipe one in, or run the command in a terminal")


def _converse(session: "ChatSession", checkpoint: str) -> None:
    """Reads lines from the terminal until Ctrl-D."""
    from .chat_session import count_images

    session.note(f"{checkpoint}; /help lists the commands, Ctrl-D leaves")
    with raising_interrupts():
        read = _line_reader()
        while True:
            try:
                line = read(f"[{count_images(len(session.images))}] > " if session.images else "> ")
            except EOFError:
                session.show("\n")
                return
            except KeyboardInterrupt:
                session.note("Ctrl-D or /quit leaves")
                continue
            try:
                if not session.enter(line):
                    return
            except KeyboardInterrupt:
                session.show("\n")
                session.note("stopped; /regenerate answers again")
            except Exception as error:  # a conversation must not be lost
                complain(_one_line(error))


def _one_line(error: Exception) -> str:
    from transformers_minigpt4.utils.text import first_line

    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    line = first_line(error)
    return line if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {line}"


def _line_reader() -> Callable[[str], str]:
    """What shows a prompt and reads a line: prompt-toolkit, with the questions of earlier days, or Python's own."""
    from pathlib import Path

    from huggingface_hub import constants

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # `input` then edits lines
    if not sys.stdout.isatty():
        return input
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    except ImportError:
        return input
    path = Path(constants.HF_HOME) / "minigpt4-chat" / "history"
    history: History = InMemoryHistory()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history = FileHistory(str(path))
    return PromptSession(history=history).prompt
