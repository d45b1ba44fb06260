"""The conversations of the web page, each with one model or several, and the memory that they take."""

import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from transformers import ProcessorMixin

from transformers_minigpt4.inference.batching import BatchedModel
from transformers_minigpt4.inference.chat import PRESETS, Chat, Turn

from .web_images import Limits, check_pixels, keep, load, thumbnail


_PAUSE = 0.1  # seconds between two updates of a page
_MOST = 1000  # conversations that are kept


@dataclass(frozen=True)
class Served:
    """A model of the page, the checkpoint it is from, and what the page calls it."""

    name: str
    checkpoint: str
    model: BatchedModel
    processor: ProcessorMixin


@dataclass
class Exchange:
    """A question with its images, the settings it was asked with, and what each model has answered so far."""

    question: str
    files: tuple[Path, ...]
    parameters: dict[str, object]
    answers: list[str] = field(default_factory=list)


class Conversation:
    """
    A conversation that all models of the page answer, or two that are drawn at random if it is blind.

    What the models have read can be dropped at any time and is then read again: the texts are here, and the images in
    a folder.

    Args:
        served (`Sequence[Served]`): the models, in the order of their columns.
        folder (`Path`): for the images; deleted by `close`.
        limits (`Limits`): what may be asked for.
        revealed (`bool`): whether the page shows which model is which.
    """

    def __init__(self, served: Sequence[Served], folder: Path, limits: Limits, revealed: bool) -> None:
        self.key = secrets.token_urlsafe(16)
        self.served, self.folder, self.limits, self.revealed = list(served), folder, limits, revealed
        self.exchanges: list[Exchange] = []
        self.voted = False  # about the last answers
        self._chats: list[Chat] = []  # empty before the first question, and when they have been dropped
        self._files = 0
        self._stop = threading.Event()
        self._busy = threading.Lock()

    @property
    def is_answering(self) -> bool:
        return self._busy.locked()

    @property
    def memory(self) -> int:
        """Bytes of keys, values and images that are kept for the next question."""
        images = [image for chat in self._chats[:1] for turn in chat.turns for image in turn.images]
        return sum(chat.cache_bytes for chat in self._chats) + sum(3 * image.width * image.height for image in images)

    def drop(self) -> None:
        """Frees that memory, unless it is in use."""
        if self._busy.acquire(blocking=False):
            try:
                self._chats = []
            finally:
                self._busy.release()

    def ask(self, question: str, files: Sequence[Path], parameters: Mapping[str, object]) -> Iterator[None]:
        """
        Asks all models. Yields whenever there is more to show; a caller that stops iterating stops the answers.

        Raises:
            ValueError: for what cannot be asked; the conversation stays as it was.
            RuntimeError: if it is being answered already.
        """
        with self._answering():
            images = self._checked(question, files)
            chats = self._open(parameters)
            exchange = Exchange(question, tuple(self._keep(files, images)), dict(chats[0].parameters))
            self.exchanges.append(exchange)
            try:
                yield from self._answer(chats, exchange, lambda chat, show: chat.ask(question, images, show))
            except Exception:
                self.exchanges.remove(exchange)
                raise

    def regenerate(self, parameters: Mapping[str, object]) -> Iterator[None]:
        """Has the last question answered again; as `ask`."""
        with self._answering():
            exchange = self._last()
            answers = exchange.answers
            chats = self._open(parameters)
            try:
                yield from self._answer(chats, exchange, lambda chat, show: chat.regenerate(show))
                exchange.parameters = dict(chats[0].parameters)
            except Exception:
                exchange.answers = answers
                self._chats = []  # some may have their new answer
                raise

    def take_back(self) -> Exchange:
        """
        Takes back the last question and its answers, and returns them.

        Raises:
            ValueError: if nothing has been asked.
            RuntimeError: while it is being answered.
        """
        with self._answering():
            exchange = self._last()
            for chat in self._chats:
                chat.undo()
            self.exchanges.pop()
            return exchange

    def stop(self) -> None:
        """Ends the answers that are being generated; what has been said is kept."""
        self._stop.set()
        for chat in self._chats:
            chat.stop()

    def wait(self, seconds: float) -> bool:
        """Waits until nothing is being answered; `False` if it takes longer."""
        if self._busy.acquire(timeout=seconds):
            self._busy.release()
            return True
        return False

    def close(self) -> None:
        """Stops, and deletes the images."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _last(self) -> Exchange:
        if not self.exchanges:
            raise ValueError("nothing has been asked yet")
        return self.exchanges[-1]

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this conversation is being answered; wait, or stop the answer")
        try:
            self._stop.clear()
            self.voted = False
            yield
        finally:
            self._busy.release()

    def _checked(self, question: str, files: Sequence[Path]) -> list[Image.Image]:
        """The images of a question, if the limits allow it."""
        limits = self.limits
        if not question.strip():
            raise ValueError("the message has no text; ask something, such as 'Describe this image in detail.'")
        if len(question) > limits.characters:
            raise ValueError(f"the message has {len(question):,} characters, but {limits.characters:,} is the most")
        if len(files) > limits.images:
            raise ValueError(f"the message has {len(files)} images, but {limits.images} is the most; send fewer")
        seen = [image for chat in self._chats[:1] for turn in chat.turns for image in turn.images]
        check_pixels(files, limits, before=sum(image.width * image.height for image in seen))
        return [load(path) for path in files]

    def _keep(self, files: Sequence[Path], images: Sequence[Image.Image]) -> Iterator[Path]:
        for path, image in zip(files, images):
            self._files += 1
            kept = keep(path, self.folder, self._files)
            thumbnail(image, kept)
            yield kept

    def _open(self, parameters: Mapping[str, object]) -> list[Chat]:
        """The chats with all models, with what they have read, or to read everything again."""
        if not self._chats:
            turns = [(exchange, tuple(load(path) for path in exchange.files)) for exchange in self.exchanges]
            chats = [Chat(served.model, served.processor, read_ahead=False) for served in self.served]
            for number, chat in enumerate(chats):
                chat.turns = [Turn(exchange.question, images, exchange.answers[number]) for exchange, images in turns]
            self._chats = chats
        for chat in self._chats:
            chat.parameters = {}
            chat.set_parameters(**{**PRESETS["authors"], **parameters})
            longest = int(str(chat.parameters["max_new_tokens"]))
            chat.set_parameters(max_new_tokens=min(longest, self.limits.new_tokens))
        return self._chats

    def _answer(
        self, chats: Sequence[Chat], exchange: Exchange, work: Callable[[Chat, Callable[[str], object]], str]
    ) -> Iterator[None]:
        """Lets all models answer at the same time; `exchange.answers` grows meanwhile."""
        before = [list(chat.turns) for chat in chats]
        exchange.answers = answers = [""] * len(chats)
        errors: list[Exception] = []

        def run(number: int) -> None:
            def show(text: str) -> None:
                answers[number] += text
                if self._stop.is_set():
                    chats[number].stop()

            try:
                answers[number] = work(chats[number], show)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(chats))]
        for thread in threads:
            thread.start()
        try:
            yield
            shown = list(answers)
            while any(thread.is_alive() for thread in threads):
                next(thread for thread in threads if thread.is_alive()).join(_PAUSE)
                if shown != answers:
                    shown = list(answers)
                    yield
        finally:
            while any(thread.is_alive() for thread in threads):  # left before the end
                self.stop()
                time.sleep(0.01)
        if errors:
            for chat, turns in zip(chats, before):
                chat.turns = turns
            raise errors[0]


class Conversations:
    """
    All conversations of a page.

    Args:
        served (`Sequence[Served]`): the models.
        folder (`Path`): for images.
        memory (`int`): bytes of keys, values and images that conversations may keep between questions; beyond that,
            those that have been idle the longest read everything again.
        blind (`bool`, *optional*, defaults to `False`): whether each conversation is with two models, drawn at
            random, whose names are not shown before a vote.
        limits (`Limits`, *optional*): what one person may ask for.
    """

    def __init__(
        self, served: Sequence[Served], folder: Path, memory: int, blind: bool = False, limits: Limits | None = None
    ) -> None:
        self.served, self.folder, self.memory, self.blind = served, folder, memory, blind
        self.limits = limits or Limits()
        self._all: OrderedDict[str, Conversation] = OrderedDict()  # the idle ones first
        self._lock = threading.Lock()

    @property
    def columns(self) -> int:
        """Models that answer one conversation."""
        return 2 if self.blind else len(self.served)

    def find(self, key: str) -> Conversation | None:
        """The conversation of a key."""
        with self._lock:
            if key in self._all:
                self._all.move_to_end(key)
            return self._all.get(key)

    def new(self) -> Conversation:
        """An empty conversation; the oldest is forgotten if there are too many."""
        served = secrets.SystemRandom().sample(list(self.served), 2) if self.blind else self.served
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        conversation = Conversation(served, folder, self.limits, revealed=not self.blind)
        with self._lock:
            self._all[conversation.key] = conversation
            old = [self._all.popitem(last=False)[1] for _ in range(len(self._all) - _MOST)]
        for forgotten in old:
            forgotten.close()
        return conversation

    def forget(self, key: str) -> None:
        """Stops a conversation and deletes it."""
        with self._lock:
            conversation = self._all.pop(key, None)
        if conversation is not None:
            conversation.close()

    def shrink(self) -> None:
        """Drops what the conversations have read that were idle the longest, until the rest fits in the memory."""
        with self._lock:
            idle = list(self._all.values())
        total = sum(conversation.memory for conversation in idle)
        for conversation in idle:
            if total <= self.memory:
                return
            total -= conversation.memory
            conversation.drop()
            total += conversation.memory


def letter(column: int) -> str:
    """What a column is called."""
    return chr(ord("A") + column)
