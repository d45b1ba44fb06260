"""Scores the demo's texts by plain rules: which attributes are right, and which outputs failed, and how."""

import re
from collections.abc import Sequence
from typing import Literal

from .world import ATTRIBUTES, COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Scene


Failure = Literal["repeated", "cut off", "off-topic"]
FAILURES: tuple[Failure, ...] = ("repeated", "cut off", "off-topic")

_PLACE = re.compile(rf"\b(?:({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})|center)\b")
_MIN_WORDS = 8  # the shortest description of the training texts has 13


def named_values(text: str) -> dict[str, set[str]]:
    """The values that a text names, for each of `colour`, `shape`, `size`, `place`."""
    lower = text.lower()
    words = set(re.findall(r"[a-z]+", lower))
    places = {match.group(0) for match in _PLACE.finditer(lower)}
    return {
        "colour": words & set(COLOURS),
        "shape": words & set(SHAPES),
        "size": words & set(SIZES),
        "place": {"center" if place == "middle center" else place for place in places},
    }


def right_attributes(text: str, scene: Scene) -> dict[str, bool]:
    """Whether a text names each attribute with the image's value and with no other value."""
    named = named_values(text)
    return {attribute: named[attribute] == {getattr(scene, attribute)} for attribute in ATTRIBUTES}


# What the answers to the questions of texts.py must name.
ASKED = {
    "What is in the picture?": ("colour", "shape"),
    "What color is it?": ("colour",),
    "What color is the shape?": ("colour",),
    "What shape is it?": ("shape",),
    "How large is it?": ("size",),
    "Is it large or small?": ("size",),
    "Where is it?": ("place",),
    "Where is the shape?": ("place",),
}


def is_right_answer(question: str, text: str, scene: Scene) -> bool:
    """Whether an answer to one of `texts.QUESTIONS` names what was asked with the image's value and no other."""
    right = right_attributes(text, scene)
    return all(right[attribute] for attribute in ASKED[question])


def failure(text: str, scene: Scene, ended: bool = True) -> Failure | None:
    """
    How a description failed, after the three kinds of the paper's section 4.3, or `None`.

    - `repeated`: a sentence occurs twice, a word three times in a row, or a phrase of 2 to 8 words twice in a row.
    - `cut off`: the stop string was not reached, the last sentence does not end, or there are fewer than 8 words.
    - `off-topic`: of the four attributes, two or more are wrong or missing: it describes another image.

    Args:
        text: The answer without its stop string.
        scene: What the image shows.
        ended: Whether the stop string came before the limit of new tokens.

    Returns:
        The first of the three that holds.
    """
    if _repeats(text):
        return "repeated"
    if not ended or not text.rstrip().endswith((".", "!", "?")) or len(text.split()) < _MIN_WORDS:
        return "cut off"
    if sum(right_attributes(text, scene).values()) <= len(ATTRIBUTES) - 2:
        return "off-topic"
    return None


def is_well_formed(text: str, ended: bool) -> bool:
    """Whether an answer of any length reached its stop string at the end of a sentence and repeats nothing."""
    return ended and text.rstrip().endswith((".", "!", "?")) and not _repeats(text)


def _repeats(text: str) -> bool:
    sentences = [" ".join(sentence.lower().split()) for sentence in re.split(r"[.!?]", text) if sentence.strip()]
    if len(set(sentences)) < len(sentences):
        return True
    words = re.findall(r"[a-z']+", text.lower())
    if any(words[i] == words[i + 1] == words[i + 2] for i in range(len(words) - 2)):
        return True
    return any(
        words[i : i + length] == words[i + length : i + 2 * length]
        for length in range(2, 9)
        for i in range(len(words) - 2 * length + 1)
    )


def summarize(texts: Sequence[str], scenes: Sequence[Scene], ended: Sequence[bool]) -> dict[str, float]:
    """
    Shares over a set of descriptions.

    Args:
        texts: One description per image.
        scenes: What each image shows.
        ended: Whether each description reached its stop string.

    Returns:
        `dict`: `colour`, `shape`, `size`, `place` and their mean `attributes`; `repeated`, `cut off`, `off-topic` and
        their sum `failed`; each between 0 and 1.

    Raises:
        ValueError: when the three lists differ in length or are empty.
    """
    if not texts or not len(texts) == len(scenes) == len(ended):
        raise ValueError(
            f"Got {len(texts)} texts, {len(scenes)} scenes and {len(ended)} end flags. Give one of each per image."
        )
    right = [right_attributes(text, scene) for text, scene in zip(texts, scenes)]
    kinds = [failure(text, scene, end) for text, scene, end in zip(texts, scenes, ended)]
    shares = {attribute: sum(row[attribute] for row in right) / len(right) for attribute in ATTRIBUTES}
    shares["attributes"] = sum(shares.values()) / len(ATTRIBUTES)
    shares.update({str(kind): kinds.count(kind) / len(kinds) for kind in FAILURES})
    shares["failed"] = sum(kind is not None for kind in kinds) / len(kinds)
    return shares
