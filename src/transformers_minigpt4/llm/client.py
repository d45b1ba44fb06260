"""What a chat model is, whether at an endpoint or local."""

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from .budget import Ledger
from .cache import AnswerCache
from .types import ChatAnswer, ChatError, ChatSettings, Message, Usage


Key = TypeVar("Key")


class ChatModel(ABC):
    """
    A text language model that answers conversations. Use it as a context manager, or call `close`.

    Args:
        settings: What to ask and how.
        cache: Answers of earlier runs, or `None`.
        spent: What earlier runs have used of the same budget.
    """

    def __init__(self, settings: ChatSettings, cache: AnswerCache | None = None, spent: Usage | None = None) -> None:
        self.settings = settings
        self.cache = cache
        self.ledger = Ledger(settings, spent or Usage())

    @property
    def name(self) -> str:
        return self.settings.model

    @property
    def usage(self) -> Usage:
        """What this object has used so far, without what earlier runs have `spent`."""
        return self.ledger.usage

    @abstractmethod
    def identity(self) -> str:
        """What distinguishes this model from others of the same name, for the cache."""

    @abstractmethod
    def complete_many(
        self, requests: Iterable[tuple[Key, list[Message]]]
    ) -> Iterator[tuple[Key, ChatAnswer | ChatError]]:
        """
        Answers many conversations, lazily: only as many are taken as are being worked on.

        Args:
            requests: Pairs of a key of any type and a conversation.

        Yields:
            `(key, answer or error)` in the order in which they are finished.

        Raises:
            ChatError: for what concerns every request: a refused key, nothing at the address, an exhausted budget.
                What was in flight is waited for and yielded first.
        """

    def complete(self, messages: list[Message]) -> ChatAnswer:
        """
        Answers one conversation.

        Args:
            messages: `{"role", "content"}` with text as content.

        Raises:
            ChatError: without a usable answer; see `kind`. An answer that was cut off is one of these.
        """
        ((_, result),) = self.complete_many([(None, messages)])
        if isinstance(result, ChatError):
            raise result
        return result

    @contextlib.contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Answers at another temperature than that of the settings, within the block."""
        settings = self.settings
        self.settings = replace(settings, temperature=temperature)
        try:
            yield
        finally:
            self.settings = settings

    def close(self) -> None:
        """Releases connections and the cache's file."""
        if self.cache is not None:
            self.cache.close()

    def __enter__(self) -> "ChatModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request_digest(self, messages: list[Message]) -> str:
        """SHA-256 of everything that decides an answer: model, decoding settings, conversation."""
        settings = self.settings
        asked = [self.identity(), settings.model, settings.temperature, settings.max_tokens, messages]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def from_cache(self, messages: list[Message]) -> ChatAnswer | None:
        """The answer of an earlier request, checked as a fresh one is."""
        if self.cache is None:
            return None
        answer = self.cache.get(self.request_digest(messages))
        if answer is None:
            return None
        self.ledger.count_cached()
        return self.checked(replace(answer, cost=0.0, cached=True))

    def keep(self, messages: list[Message], answer: ChatAnswer) -> ChatAnswer:
        """Puts a fresh answer into the cache, even one that was cut off, since it would be again; then checks it."""
        if self.cache is not None:
            self.cache.put(self.request_digest(messages), answer)
        return self.checked(answer)

    def checked(self, answer: ChatAnswer) -> ChatAnswer:
        """
        The answer, if it is complete.

        Raises:
            ChatError: if it was cut off (`kind="cut_off"`, with the answer) or blocked (`kind="filtered"`).
        """
        if answer.finish_reason == "length":
            raise ChatError(
                "cut_off",
                f"the answer of {self.name} was cut off at {answer.completion_tokens} tokens; raise max_tokens above "
                f"{self.settings.max_tokens}, or use a model with a longer context",
                answer=answer,
            )
        if answer.finish_reason == "content_filter":
            raise ChatError("filtered", f"the content filter of {self.name} blocked the answer; try another model")
        return answer
