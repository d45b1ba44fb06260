"""What one types in the terminal chat: questions, and commands that begin with a slash."""

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image, ImageGrab

from transformers_minigpt4.processing.image_utils_minigpt4 import load_image
from transformers_minigpt4.utils.text import first_line

from .chat import PRESETS, Chat


_HELP = """\
/image PATH...     give images with the next question: files, URLs, or without a name the clipboard
/regenerate        answer the last question again
/undo              take back the last question and its answer
/reset             forget the conversation and the images that wait
/system [TEXT]     show or change the system message; "" is an empty one
/params [NAME=VALUE... | authors | greedy]
                   show or change do_sample, temperature, top_p, top_k, repetition_penalty, max_new_tokens
/save FILE         save the conversation with its images as JSON
/load FILE         continue a saved conversation
/help              show this list
/quit              leave; so does Ctrl-D. Ctrl-C stops an answer"""


class ChatSession:
    """
    Carries out what is typed.

    Args:
        chat (`Chat`): the conversation.
        show (`Callable[[str], object]`): writes pieces of answers.
        note (`Callable[[str], object]`): writes a line about anything else.
        prepare (`bool`, *optional*, defaults to `False`): whether to prepare the next turn after each answer, while a
            person reads it.
    """

    def __init__(
        self, chat: Chat, show: Callable[[str], object], note: Callable[[str], object], prepare: bool = False
    ) -> None:
        self.chat, self.show, self.note, self.prepare = chat, show, note, prepare
        self.images: list[Image.Image] = []  # for the next question
        self._files: set[Path] = set()  # that may be replaced: they hold this conversation
        self._commands: dict[str, Callable[[str], object]] = {
            "/image": self._image,
            "/regenerate": self._regenerate,
            "/undo": self._undo,
            "/reset": self._reset,
            "/system": self._system,
            "/params": self._params,
            "/save": self._save,
            "/load": self._load,
            "/help": lambda words: self.note(_HELP),
        }

    def enter(self, line: str) -> bool:
        """
        Carries out one line.

        Returns:
            `bool`: whether to go on; `/quit` and `/exit` leave.

        Raises:
            ValueError: for a command that does not exist or cannot be carried out.
            OSError: for a file that cannot be read or written.
        """
        name, _, rest = line.rstrip().partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name in self._commands:
            self._commands[name](rest.strip())
        elif name.startswith("/"):
            raise ValueError(f"there is no command {name}; /help lists them, and a space before a slash asks it")
        elif line.strip():
            self._ask(line.strip())
        return True

    def _ask(self, question: str) -> None:
        before = len(self.chat.turns)
        try:
            self.chat.ask(question, self.images, self.show)
        finally:
            if len(self.chat.turns) > before:
                self.images = []
        self._end()

    def _end(self) -> None:
        self.show("\n")
        if self.prepare:
            with contextlib.suppress(KeyboardInterrupt):
                self.chat.prepare()

    def _image(self, words: str) -> None:
        sources = [_path(word) for word in _split(words)] if words else list(_clipboard())
        self.images += [load_image(source) for source in sources]
        self.note(f"{count_images(len(self.images))} for the next question")

    def _regenerate(self, words: str) -> None:
        self.chat.regenerate(self.show)
        self._end()

    def _undo(self, words: str) -> None:
        self.note(f"took back: {self.chat.undo().question}")

    def _reset(self, words: str) -> None:
        self.chat.reset()
        self.images = []
        self.note("forgot the conversation")

    def _system(self, words: str) -> None:
        if words:
            self.chat.system = "" if words == '""' else words
        shown = "that of the chat template" if self.chat.system is None else repr(self.chat.system)
        self.note(f"system message: {shown}")

    def _params(self, words: str) -> None:
        changes: dict[str, object] = {}
        for word in _split(words):
            name, equals, value = word.partition("=")
            if not equals and name not in PRESETS:
                raise ValueError(f"{word!r} is neither NAME=VALUE nor {' nor '.join(PRESETS)}, as in temperature=0.7")
            changes.update({name: value} if equals else PRESETS[name])
        self.chat.set_parameters(**changes)
        shown = ", ".join(f"{name}={value}" for name, value in self.chat.parameters.items())
        self.note(shown or "the checkpoint's own parameters")

    def _save(self, words: str) -> None:
        path = _one_file(words, "/save")
        if path.exists() and path.resolve() not in self._files:
            raise ValueError(f"{path} exists already; choose another name")
        self.chat.save(path)
        self._files.add(path.resolve())
        self.note(f"saved in {path}; /load {shlex.quote(str(path))} continues it")

    def _load(self, words: str) -> None:
        path = _one_file(words, "/load")
        chat = Chat.load(path, self.chat.model, self.chat.processor)
        chat.read_ahead = False
        self.chat, self.images, self._files = chat, [], {path.resolve()}
        for turn in chat.turns:
            pictures = f"[{count_images(len(turn.images))}] " if turn.images else ""
            self.note(f"{pictures}> {turn.question}\n{turn.answer}")


def count_images(number: int) -> str:
    """Such as `"1 image"` or `"2 images"`."""
    return f"{number} image" if number == 1 else f"{number} images"


def _clipboard() -> Iterator[str | Image.Image]:
    """The image on the clipboard, or the image files that were copied in a file manager."""
    try:
        found = ImageGrab.grabclipboard()
    except (NotImplementedError, OSError) as error:
        raise ValueError(f"the clipboard cannot be read: {first_line(error)}; name files after /image") from error
    if not found:
        raise ValueError("there is no image on the clipboard; copy one, or name files after /image")
    yield from [found] if isinstance(found, Image.Image) else found


def _split(words: str) -> list[str]:
    try:
        return shlex.split(words)
    except ValueError as error:
        raise ValueError(f"cannot read {words!r}: {first_line(error)}; close the quotation mark") from error


def _path(word: str) -> str:
    return str(Path(word).expanduser()) if word.startswith("~") else word


def _one_file(words: str, command: str) -> Path:
    found = _split(words)
    if len(found) != 1:
        raise ValueError(f"{command} takes one file, but {len(found)} were given; quote a name with spaces")
    return Path(_path(found[0]))
