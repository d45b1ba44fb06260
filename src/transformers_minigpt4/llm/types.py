"""What chat models and their callers exchange: settings, messages, answers, errors, usage."""

import math
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from urllib.parse import urlsplit

from transformers_minigpt4.utils.settings import field_names, field_values
from transformers_minigpt4.utils.text import without_surrogates


Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}

# What can go wrong with a request, and what each word means.
KINDS = {
    "auth": "no key, or one that the endpoint refuses",
    "budget": "the next request could cost more than is left of the budget",
    "connection": "the connection broke before the answer was complete",
    "cut_off": "the answer was cut off at its limit of tokens",
    "down": "nothing answers at the address",
    "empty": "an answer without text",
    "filtered": "the endpoint's content filter blocked the answer",
    "garbage": "an answer that is not a chat completion: a web page, broken JSON, JSON of another shape",
    "missing": "a package that is not installed",
    "not_found": "the endpoint has no such address or model",
    "quota": "the account's own quota is used up",
    "rate_limit": "too many requests, after all retries",
    "redirected": "the endpoint redirects to another server, or in a circle",
    "refused": "the endpoint refuses this one request, for instance because it is too long",
    "server": "the endpoint failed, after all retries",
    "stopped": "given up because another request has failed for a reason that affects all",
    "timeout": "no complete answer in time, after all retries",
}


class ChatError(RuntimeError):
    """
    A request without a usable answer.

    Args:
        kind: One of [`KINDS`].
        message: What happened and what to do, in one line.
        fatal: Whether further requests would fail for the same reason.
        answer: The part of the answer that there is (`kind="cut_off"`).
    """

    def __init__(self, kind: str, message: str, *, fatal: bool = False, answer: "ChatAnswer | None" = None) -> None:
        super().__init__(message)
        self.kind, self.fatal, self.answer = kind, fatal, answer


class BudgetExhausted(ChatError):
    """The next request could exceed the budget, so it was not sent."""

    def __init__(self, message: str) -> None:
        super().__init__("budget", message, fatal=True)


@dataclass(frozen=True)
class ChatSettings:
    """
    Which model answers, and how much an answer may take.

    Args:
        model: Name of the model at the endpoint, or folder or Hub id of a local one.
        base_url: Address of an OpenAI-compatible endpoint, usually ending in `/v1`. Without it the model is loaded
            on this machine with transformers.
        concurrency: Requests in flight at once; for a local model, prompts in one batch.
        requests_per_minute: Requests are sent at least 60 / this many seconds apart. Endpoint only.
        timeout: Seconds that one request may take from sending to the last byte. Endpoint only.
        max_retries: Further tries after a fault that may pass: no connection, time-out, 429, 5xx. Endpoint only.
        temperature: 0 decodes greedily.
        max_tokens: Longest answer.
        budget_tokens: Limit of prompt and answer tokens together. A request is sent only if the most that it can use
            still fits.
        budget_cost: Limit of the cost, in the currency of the prices, which it needs.
        price_in, price_out: Price of a million prompt tokens and of a million answer tokens.
        api_key_env: Name of the environment variable that holds the endpoint's key. It may be unset, since local
            servers need none.

    Raises:
        ValueError: for settings that cannot work.
    """

    model: str
    base_url: str | None = None
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout: float = 60.0
    max_retries: int = 5
    temperature: float = 0.0
    max_tokens: int = 1024
    budget_tokens: int | None = None
    budget_cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None
    api_key_env: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError(
                "no chat model is named; set `model` to its name at the endpoint, or to a folder or Hub id"
            )
        for name, least in (("concurrency", 1), ("max_retries", 0), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; set it to {least} or more")
        for name in ("timeout", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}; set it to a number above 0")
        for name in ("temperature", "budget_tokens", "budget_cost", "price_in", "price_out"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` is {value}; set it to 0 or more")
        if self.budget_cost is not None and (self.price_in is None or self.price_out is None):
            raise ValueError("budget_cost needs prices; set price_in and price_out, per million tokens")
        if self.base_url is not None:
            address = urlsplit(self.base_url)
            if address.username is not None or address.password is not None or address.query:
                # Nothing of the value, which would put the secret into logs.
                raise ValueError(
                    "base_url holds a user name, password or query; put the key into the environment variable "
                    f"{self.api_key_env} and leave it out of the address"
                )
            if address.scheme not in ("http", "https") or not address.hostname:
                raise ValueError(f"base_url is {self.base_url!r}; give an address such as http://127.0.0.1:8000/v1")

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of this many tokens; 0 without prices."""
        return (prompt_tokens * (self.price_in or 0.0) + completion_tokens * (self.price_out or 0.0)) / 1e6

    @classmethod
    def from_options(
        cls, options: Mapping[str, object], prefix: str, names: Mapping[str, str] | None = None
    ) -> "ChatSettings | None":
        """
        Settings from flat options such as `judge_model`, `judge_base_url` and `judge_max_tokens`.

        Args:
            options: Values by name: `prefix` and a field of this class. Other names are ignored.
            prefix: What the names begin with, such as `"judge_"`.
            names: What errors call an option, by its name in `options`; by default that name.

        Returns:
            `None` if the options name no model; their types are checked nevertheless.

        Raises:
            ValueError: for settings that cannot work.
        """
        model = f"{prefix}model"
        values = field_values(cls, {k: v for k, v in options.items() if k != model or v is not None}, prefix)
        if "model" not in values:
            return None
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(prefixed(str(error), prefix, names)) from error


@dataclass(frozen=True)
class ChatAnswer:
    """
    An answer with what it used.

    `finish_reason` is `"stop"`, or `"length"` if the answer was cut off at the limit of tokens. `cost` is in the
    currency of the prices; an answer from the cache (`cached`) costs nothing, and has the token counts of the original
    request. `received` is the text with the white space at its ends, for those who read it as published scripts do; an
    endpoint's only.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cost: float
    cached: bool = False
    received: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Usage:
    """
    What a model has used: `requests` sent (retries count), answers found in the cache, tokens, and their cost.

    A request whose answer got lost after it was sent may be billed nevertheless, so it counts with the most that it
    can have used. So does one whose endpoint reports no token counts.
    """

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(one + more for one, more in zip(astuple(self), astuple(other))))


def prefixed(message: str, prefix: str, names: Mapping[str, str] | None = None) -> str:
    """A message about settings, with the names that these have as flat options (`ChatSettings.from_options`)."""
    known = field_names(ChatSettings)
    long, short = ("|".join(name for name in known if ("_" in name) == has) for has in (True, False))

    def option(match: re.Match[str]) -> str:
        name = prefix + match[0]
        return (names or {}).get(name, name)

    # `model` and `timeout` are also ordinary words, so they must be in backticks.
    return re.sub(rf"\b({long})\b|(?<=`)({short})(?=`)", option, message)


def checked_messages(messages: list[Message]) -> list[Message]:
    """
    A conversation as every model takes it; half surrogate pairs, which UTF-8 cannot encode, become `?`.

    Raises:
        ValueError: for anything but a list of `{"role", "content"}` with text.
    """
    if not messages or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise ValueError(f"a conversation is a list of {{'role', 'content'}} with text, not {str(messages)[:100]}")
    return [{**message, "content": without_surrogates(message["content"])} for message in messages]
