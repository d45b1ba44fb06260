"""What a chat request may contain: checks it, and loads its images."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub.utils import httpx
from PIL import Image

from transformers_minigpt4.processing.image_utils_minigpt4 import DEFAULT_TIMEOUT, ImageLoadError, load_image
from transformers_minigpt4.utils.files import JsonObject

from .serve_errors import ApiError


MAX_IMAGES = 128  # of one request
MAX_PIXELS = 2**27  # of all images of one request, 400 MB as RGB
_MAX_STOPS, _MAX_STOP_LENGTH = 16, 1000
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class _Rule(NamedTuple):
    is_allowed: Callable[[Any], bool]
    wanted: str


def _number(least: float, most: float) -> _Rule:
    return _Rule(
        lambda value: type(value) in (int, float) and least <= value <= most, f"a number from {least} to {most}"
    )


def _integer(least: int, most: int) -> _Rule:
    return _Rule(lambda value: type(value) is int and least <= value <= most, f"an integer from {least} to {most}")


def _only(*values: object) -> _Rule:
    shown = " or ".join(map(repr, values))
    return _Rule(lambda value: value in values, f"{shown}; nothing else is supported here")


def _are_stops(value: Any) -> bool:
    stops = [value] if isinstance(value, str) else value
    return (
        isinstance(stops, list)
        and len(stops) <= _MAX_STOPS
        and all(isinstance(stop, str) and 0 < len(stop) <= _MAX_STOP_LENGTH for stop in stops)
    )


_UNSUPPORTED = _Rule(lambda value: value in ({}, [], False), "left out; it is not supported here")

# `transformers serve` ignores some of these, and would fail on others with a trace.
_RULES: Mapping[str, _Rule] = {
    "stream": _only(True, False),
    "temperature": _number(0, 2),
    "top_p": _Rule(lambda value: type(value) in (int, float) and 0 < value <= 1, "a number above 0, up to 1"),
    "max_tokens": _integer(1, 10**9),
    "max_completion_tokens": _integer(1, 10**9),
    # It becomes a repetition penalty, as in `transformers serve`, which must not be negative.
    "frequency_penalty": _number(0, 2),
    "presence_penalty": _only(0),
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": _Rule(_are_stops, f"a text, or a list of up to {_MAX_STOPS}, of 1 to {_MAX_STOP_LENGTH} characters"),
    "n": _only(1),
    "logprobs": _only(False),
    "top_logprobs": _only(0),
    "logit_bias": _UNSUPPORTED,
    "modalities": _only(["text"]),
    "response_format": _only({"type": "text"}),
    "tools": _UNSUPPORTED,
    "functions": _UNSUPPORTED,
    "tool_choice": _only("none", "auto"),
    # Those of transformers, which replace the checkpoint's settings or the chat template.
    "generation_config": _UNSUPPORTED,
    "chat_template_kwargs": _UNSUPPORTED,
}


def check_settings(body: Mapping[str, Any]) -> None:
    """
    Refuses what would be ignored silently, or fail later.

    Raises:
        ApiError: for a setting that has a wrong type or value, or is not supported.
    """
    for name, rule in _RULES.items():
        value = body.get(name)
        if value is not None and not rule.is_allowed(value):
            raise ApiError(
                f"{name} cannot be {_brief(value)}; it must be {rule.wanted}", param=name, code="invalid_value"
            )


def load_messages(
    body: Mapping[str, Any], ends: Sequence[str], client: httpx.AsyncClient | None, timeout: float = DEFAULT_TIMEOUT
) -> list[JsonObject]:
    """
    The messages of a request, with PIL images in place of their URLs.

    Args:
        body (`Mapping[str, Any]`): the request.
        ends (`Sequence[str]`): what ends answers, and so is cut off those that a client sends back.
        client (`httpx.AsyncClient`, *optional*): downloads images.
        timeout (`float`, *optional*, defaults to 30): seconds for all downloads of the request together.

    Raises:
        ApiError: for messages of another form, and images that cannot be loaded.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a list of at least one message", param="messages", code="invalid_value")
    images = _Images(client, timeout)
    return [_message(message, f"messages[{number}]", ends, images) for number, message in enumerate(messages)]


def _message(message: object, where: str, ends: Sequence[str], images: "_Images") -> JsonObject:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ApiError(
            f"{where} must be an object whose role is one of {', '.join(_ROLES)}", param=where, code="invalid_value"
        )
    role, content = _ROLES[message["role"]], message.get("content")
    if message.get("tool_calls"):
        raise ApiError(f"{where} has tool_calls; this server calls no tools", param=where, code="invalid_value")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise ApiError(f"{where}.content must be a text or a list of parts", param=where, code="invalid_value")
    found = [_part(part, f"{where}.content[{number}]", images) for number, part in enumerate(parts)]
    if role == "assistant" and found[-1]["type"] == "text":
        found[-1]["text"] = _without_end(found[-1]["text"], ends)
    return {"role": role, "content": found}


def _part(part: object, where: str, images: "_Images") -> JsonObject:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    url = part.get("image_url") if isinstance(part, dict) and kind == "image_url" else None
    url = url.get("url") if isinstance(url, dict) else url
    if isinstance(url, str):
        return {"type": "image_url", "image_url": {"url": images.load(url, where)}}
    raise ApiError(
        f'{where} must be {{"type": "text", "text": ...}} or {{"type": "image_url", "image_url": {{"url": ...}}}}',
        param=where,
        code="invalid_value",
    )


def _without_end(answer: str, ends: Sequence[str]) -> str:
    for end in ends:
        if answer.rstrip().endswith(end):
            return answer.rstrip().removesuffix(end).rstrip()
    return answer


class _Images:
    """Loads the images of one request, within one limit of time, number and pixels for all."""

    def __init__(self, client: httpx.AsyncClient | None, timeout: float) -> None:
        self.client, self.timeout, self.end = client, timeout, time.monotonic() + timeout
        self.count = self.pixels = 0

    def load(self, url: str, where: str) -> Image.Image:
        self.count += 1
        if self.count > MAX_IMAGES:
            raise ApiError(
                f"a request may have at most {MAX_IMAGES} images; send fewer", param=where, code="too_many_images"
            )
        scheme = url.partition(":")[0].lower()
        if scheme not in ("data", "http", "https"):
            raise ApiError(
                f"the image URL {_brief(url)} is neither http://, https:// nor data:; this server reads no files",
                param=where,
                code="invalid_image_url",
            )
        left = self.end - time.monotonic()
        if scheme != "data" and left <= 0:
            raise ApiError(
                f"the images took longer than {self.timeout:g} seconds; send them as data: URLs",
                param=where,
                code="invalid_image_url",
            )
        try:
            image = load_image(url, max(left, 0.0), self.client)
        except ImageLoadError as error:
            raise ApiError(str(error), param=where, code="invalid_image") from error
        self.pixels += image.width * image.height
        if self.pixels > MAX_PIXELS:
            raise ApiError(
                f"the images of a request may have {MAX_PIXELS:,} pixels together; make them smaller",
                param=where,
                code="image_too_large",
            )
        return image


def _brief(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
