"""Reads what an OpenAI-compatible endpoint answers: the text, the tokens used, and how long to wait."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from transformers_minigpt4.utils.text import without_surrogates

from .budget import Reservation


@dataclass(frozen=True)
class Completion:
    """
    The first choice of a chat completion.

    `received` is the text with the white space at its ends; `usage` is the tokens as the endpoint says, unchecked.
    """

    received: str
    finish_reason: str
    usage: object

    @property
    def text(self) -> str:
        return self.received.strip()


_MOST_TOKENS = 10**9  # of one request; far above any model's context, and sums of it fit into a database


def read_completion(payload: bytes) -> Completion | None:
    """The first choice of a chat completion; `None` if the bytes are not one."""
    try:
        completion = json.loads(payload)
        choice = completion["choices"][0]
        text, finish_reason = choice["message"]["content"], choice.get("finish_reason")
        usage = completion.get("usage")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(text, str | None):
        return None
    finish_reason = finish_reason if isinstance(finish_reason, str) else "stop"
    return Completion(without_surrogates(text or ""), without_surrogates(finish_reason), usage)


def used_tokens(completion: Completion, reservation: Reservation) -> tuple[int, int]:
    """(prompt, answer) tokens as the endpoint reports them; without a usable report, the most that they can be."""
    said = completion.usage if isinstance(completion.usage, dict) else {}
    longest = min(reservation.completion_tokens, len(completion.text.encode()))
    prompt, answer = (
        count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= _MOST_TOKENS else bound
        for count, bound in (
            (said.get("prompt_tokens"), reservation.prompt_tokens),
            (said.get("completion_tokens"), longest),
        )
    )
    return prompt, answer


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by the header `Retry-After`, which is a number or a date; `None` without a usable one."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except (TypeError, ValueError, OverflowError):
            return None
        if when.tzinfo is None:  # "-0000", by RFC 5322: UTC without a time zone
            when = when.replace(tzinfo=UTC)
        seconds = (when - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None
