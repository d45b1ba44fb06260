"""Conversations as JSON: questions, answers, settings and the images themselves, in one file."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from transformers_minigpt4.processing.image_utils_minigpt4 import load_image
from transformers_minigpt4.utils.files import JsonObject, PathLike
from transformers_minigpt4.utils.json_files import read_json

from .chat_parameters import check_parameters


_FORMAT = "minigpt4-chat"
_VERSION = 1
_PNG = "data:image/png;base64,"


class Saved(NamedTuple):
    """What a file holds; each turn is question, images and answer."""

    system: str | None
    parameters: Mapping[str, object]
    turns: Sequence[tuple[str, tuple[Image.Image, ...], str]]


def to_json(saved: Saved) -> JsonObject:
    """What is written. Images are embedded without loss: files move, and what was on the clipboard is gone."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "system": saved.system,
        "parameters": dict(saved.parameters),
        "turns": [
            {"question": question, "images": [_as_url(image) for image in images], "answer": answer}
            for question, images, answer in saved.turns
        ],
    }


def from_json(path: PathLike) -> Saved:
    """
    Reads a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it does not hold a conversation. Images must be in it: a file that someone else wrote cannot
            make this machine read other files, or ask other machines.
    """
    content = read_json(path)
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(f"{path} is not a conversation that this version saved; save one with /save or Chat.save")
    system, parameters, turns = content.get("system"), content.get("parameters"), content.get("turns")
    if not (isinstance(system, str | None) and isinstance(parameters, dict) and isinstance(turns, list)):
        raise ValueError(f"{path}: system must be a text or null, parameters an object, and turns a list")
    try:
        return Saved(system, check_parameters(parameters), [_turn(turn) for turn in turns])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _turn(turn: Any) -> tuple[str, tuple[Image.Image, ...], str]:
    if not isinstance(turn, dict):
        raise ValueError(f"a turn cannot be {str(turn)[:50]!r}; it is an object with question, images and answer")
    question, images, answer = turn.get("question"), turn.get("images"), turn.get("answer")
    if not (isinstance(question, str) and question.strip() and isinstance(answer, str) and isinstance(images, list)):
        raise ValueError("a turn has a question and an answer, which are texts, and a list of images")
    for image in images:
        if not (isinstance(image, str) and image.startswith("data:")):
            raise ValueError(f"an image is {str(image)[:50]!r}; only images embedded as data: URLs are read")
    return question, tuple(load_image(image) for image in images), answer


def _as_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return _PNG + base64.b64encode(file.getvalue()).decode()
