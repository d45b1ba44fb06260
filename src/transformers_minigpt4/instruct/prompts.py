"""
The messages that ask for instruction data: LLaVA's, from `prompts/` byte for byte, followed by one image's captions.

A text-only model sees an image as its captions and, for two of the three kinds, as boxes of its objects.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from transformers_minigpt4.llm.types import Message


PROMPTS = Path(__file__).parent / "prompts"
CONVERSATION, DETAIL, COMPLEX = "conversation", "detail_description", "complex_reasoning"
# Shares of the rows: 58 K, 23 K and 77 K in LLaVA-Instruct-158K (section 3 of the article).
KINDS = {CONVERSATION: 58.0, DETAIL: 23.0, COMPLEX: 77.0}
WITH_BOXES = (DETAIL, COMPLEX)
CAPTIONS = 5  # that the system messages speak of; further ones are not sent


@dataclass(frozen=True)
class Box:
    """An object: its category, and x1, y1, x2, y2 as shares of width and height, with 3 decimals."""

    category: str
    corners: tuple[float, float, float, float]

    def __str__(self) -> str:
        return f"{self.category}: {list(self.corners)}"


@dataclass(frozen=True)
class Scene:
    """What the model knows of an image: `image` is its file's path below the folder of images."""

    key: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()


def messages(kind: str, captions: Sequence[str], boxes: Sequence[str], language: str = "English") -> list[Message]:
    """
    The conversation that asks for one row: system message, examples, then the image's captions and boxes.

    Args:
        kind: One of `KINDS`.
        captions: The image's captions.
        boxes: Lines of [`Box`]; for `WITH_BOXES` only.
        language: Of the answers. For others than English, a sentence that asks for it follows the system message.
    """
    system, *examples = _frame(kind)
    if language != "English":
        content = f"{system['content']}\n\nWrite everything in {language}, except the words Question and Answer."
        system = {"role": "system", "content": content}
    return [system, *examples, {"role": "user", "content": query(kind, captions, boxes)}]


def query(kind: str, captions: Sequence[str], boxes: Sequence[str]) -> str:
    """The last message: captions, one a line; for `WITH_BOXES` then an empty line and the boxes, one a line."""
    lines = list(captions)
    if kind in WITH_BOXES:
        lines += ["", *boxes]
    return "\n".join(lines)


@lru_cache
def _frame(kind: str) -> tuple[Message, ...]:
    """System message and examples of a kind."""
    folder = PROMPTS / kind
    found = [{"role": "system", "content": _text(folder / "system_message.txt")}]
    for caps in sorted(folder.glob("*_caps.txt")):
        found.append({"role": "user", "content": _text(caps)})
        found.append({"role": "assistant", "content": _text(caps.with_name(caps.name.replace("_caps", "_conv")))})
    return tuple(found)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8")  # `read_text` would change line ends


@lru_cache
def detail_questions() -> tuple[str, ...]:
    """The 16 questions of detailed descriptions (Table 12 of the article)."""
    questions: list[str] = json.loads(_text(PROMPTS / "detail_questions.json"))
    return tuple(questions)


@lru_cache
def example_lengths(kind: str) -> tuple[int, ...]:
    """Characters of the answers in a kind's examples, for estimates."""
    return tuple(len(message["content"]) for message in _frame(kind) if message["role"] == "assistant")
