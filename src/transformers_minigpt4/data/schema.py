"""The one row format that all sources give and all training takes, and the check of a row."""

import os
from typing import Any, NotRequired, TypeAlias, TypedDict

from PIL import Image


# What `validate_row` checks: `images`, and `prompt` and `completion` or `messages`.
Row: TypeAlias = dict[str, Any]


class UndecodedImage(TypedDict):
    """An image file: its content, or where it is."""

    bytes: bytes | None
    path: str | None


class Part(TypedDict):
    """A part of a message: `{"type": "image"}`, or `{"type": "text", "text"}`."""

    type: str
    text: NotRequired[str]


class Message(TypedDict):
    """A turn of a conversation."""

    role: str
    content: list[Part]


RowImage: TypeAlias = Image.Image | UndecodedImage
# The position of an image in a prompt; the processor's own token. Messages have a part `{"type": "image"}` instead.
IMAGE_PLACEHOLDER = "<ImageHere>"
# Far above what any model reads; a text of many megabytes would stop a data worker for minutes.
MAX_CHARACTERS = 1_000_000
_KEYS = {"images", "prompt", "completion", "messages", "key", "source"}


class DataError(ValueError):
    """Data that cannot be used; the message says what was given, why it fails and what to do."""


def validate_row(row: object) -> None:
    """
    Checks one row.

    A row has `images` (list) and text in one of TRL's two formats:

    - one turn: `prompt` and `completion`, two strings. The prompt holds one `<ImageHere>` per image. Neither holds
      `<s>`: the collator adds what a model needs in front of its text, so that rows fit any model.
    - several turns: `messages`, a list of `{"role", "content"}` with the roles `system` (first only), then `user` and
      `assistant` in turn, ending with `assistant`. Its content is a list of `{"type": "text", "text"}` and, for users,
      `{"type": "image"}`, one per image.

    An image is a PIL image, or, undecoded, `{"bytes", "path"}` with one of the two set. `key` and `source` (strings)
    may say where the row comes from.

    Args:
        row: The value to check.

    Raises:
        DataError: for the first thing that is wrong.
    """
    if not isinstance(row, dict):
        raise DataError(f"a row is a dict, not {type(row).__name__}")
    if unknown := row.keys() - _KEYS:
        raise DataError(f"unknown keys {sorted(map(str, unknown))} in a row; it may have {sorted(_KEYS)}")
    images = row.get("images")
    if not isinstance(images, list):
        raise DataError(f"a row needs a list `images`, empty if it has none, not {images!r:.80}")
    for image in images:
        _check_image(image)
    turns = {"prompt", "completion"} & row.keys()
    if "messages" in row and not turns:
        _check_messages(row["messages"], len(images))
    elif len(turns) == 2 and "messages" not in row:
        _check_turn(row["prompt"], row["completion"], len(images))
    else:
        found = sorted(turns | (row.keys() & {"messages"}))
        raise DataError(f"a row has `prompt` and `completion`, or `messages`; this one has {found}")


def _check_image(image: object) -> None:
    if isinstance(image, Image.Image):
        return
    if isinstance(image, dict) and image.keys() <= {"bytes", "path"}:
        content, path = image.get("bytes"), image.get("path")
        if isinstance(content, bytes) or (content is None and isinstance(path, (str, os.PathLike)) and str(path)):
            return
    raise DataError(f"an image is a PIL image or {{'bytes', 'path'}} with one of them set, not {image!r:.80}")


def _check_turn(prompt: object, completion: object, images: int) -> None:
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError(f"`prompt` and `completion` are strings, not {prompt!r:.40} and {completion!r:.40}")
    if not completion.strip():
        raise DataError("the completion is empty, so there is nothing to learn from the row")
    if prompt.count(IMAGE_PLACEHOLDER) != images:
        raise DataError(
            f"the prompt holds {prompt.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} for {images} images; "
            f"write one for each: {prompt!r:.120}"
        )
    _check_text(completion)


def _check_messages(messages: object, images: int) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"`messages` is a list of turns, not {messages!r:.80}")
    if not all(isinstance(message, dict) and isinstance(message.get("content"), list) for message in messages):
        raise DataError(f"a message is {{'role', 'content'}} with a list as content, unlike one of {messages!r:.120}")
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(f"roles are `user` and `assistant` in turn, ending with `assistant`, not {roles!r:.120}")
    placed = 0
    for message in messages:
        for part in message["content"]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image" and message["role"] == "user":
                placed += 1
            elif kind == "text" and isinstance(part.get("text"), str):
                _check_text(part["text"])
            else:
                raise DataError(f"a {message['role']} message cannot hold {part!r:.80}")
        if message["role"] == "assistant" and not message_text(message).strip():
            raise DataError("an assistant message is empty, so there is nothing to learn from it")
    if placed != images:
        raise DataError(f"the messages place {placed} images, and the row has {images}")


def _check_text(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"a text has {len(text):,} characters, more than the {MAX_CHARACTERS:,} of any row")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"a text contains half of a character (a lone surrogate) at position {error.start}") from error
    if IMAGE_PLACEHOLDER in text:
        raise DataError(f"a text contains {IMAGE_PLACEHOLDER}, which would be replaced by an image: {text!r:.120}")


def row_images(row: Row) -> list[RowImage]:
    """The images of a row, which other datasets may keep under `image`."""
    return [row["image"]] if row.get("image") is not None else list(row.get("images") or [])


def message_text(message: Message) -> str:
    """The texts of a message, joined by spaces."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def answer_text(row: Row) -> str:
    """What is learned from a row: its completion, or everything that the assistant says in its messages."""
    if "completion" in row:
        return row["completion"]
    return " ".join(message_text(message) for message in row["messages"] if message["role"] == "assistant")
