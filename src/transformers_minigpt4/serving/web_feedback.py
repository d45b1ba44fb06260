"""Votes and flags of the web page: a JSON Lines file, and the images that it names."""

import contextlib
import hashlib
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path

from transformers_minigpt4.utils.files import JsonLinesWriter, JsonObject, folder_lock
from transformers_minigpt4.utils.text import without_surrogates

from .web_conversations import Conversation, Exchange, letter


FILE, IMAGES = "feedback.jsonl", "images"
_LONGEST_REASON = 2_000  # characters


class Feedback:
    """
    Writes votes and flags.

    Args:
        folder (`Path`): created at the first of them. Its file `feedback.jsonl` has one record per vote or flag, with
            the conversation, the settings of each question, and the names of the images in `images/`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()

    def vote(self, conversation: Conversation, choice: str) -> None:
        """
        Records which answers are better, those to all questions so far.

        Args:
            conversation (`Conversation`): with at least one answer.
            choice (`str`): the letter of the column that is best, or `"tie"` or `"none"`.
        """
        self._write(conversation, {"type": "vote", "best": choice})

    def flag(self, conversation: Conversation, reason: str) -> None:
        """Records that something is wrong with a conversation."""
        reason = without_surrogates(reason)[:_LONGEST_REASON]
        self._write(conversation, {"type": "flag", "reason": reason})

    def _write(self, conversation: Conversation, record: JsonObject) -> None:
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **record,
            "blind": not conversation.revealed,
            "models": {letter(number): served.checkpoint for number, served in enumerate(conversation.served)},
            "turns": [self._turn(exchange) for exchange in conversation.exchanges],
        }
        refusal = f"{self.folder} is in use by {{owner}}; give each page its own --output"
        with self._lock, contextlib.ExitStack() as stack:
            stack.enter_context(folder_lock(self.folder, refusal, "votes", error=OSError))
            images = self.folder / IMAGES
            images.mkdir(exist_ok=True)
            for exchange in conversation.exchanges:
                for path in exchange.files:
                    kept = images / _name(path)
                    if not kept.exists():
                        shutil.copyfile(path, kept)
            stack.enter_context(JsonLinesWriter(self.folder / FILE)).append([record])

    @staticmethod
    def _turn(exchange: Exchange) -> JsonObject:
        return {
            "question": without_surrogates(exchange.question),
            "images": [f"{IMAGES}/{_name(path)}" for path in exchange.files],
            "answers": {letter(number): without_surrogates(answer) for number, answer in enumerate(exchange.answers)},
            "parameters": exchange.parameters,
        }


def _name(path: Path) -> str:
    """A name that follows from the content: the same image is kept once, whatever people call it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32] + path.suffix.lower()
