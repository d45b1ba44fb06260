"""Turns a language model's answer into questions and answers, or refuses it with a reason."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers_minigpt4.curation.language import OTHERS, other_language, other_script
from transformers_minigpt4.curation.phrases import APOLOGIES, SELF_REFERENCE
from transformers_minigpt4.curation.text_checks import Text, not_english, says, unfinished

from .prompts import COMPLEX, DETAIL


VERSION = 1  # goes up when the code changes what is refused
# Why an answer is refused, and what each word means; in the order in which they are looked for.
REASONS = {
    "cut off": "ended by the limit of tokens, or in the middle of a sentence",
    "empty": "no text",
    "broken blocks": "not `Question:` and `Answer:` blocks between lines of `===`, or such blocks in a description",
    "question without answer": "a question that another question or the end follows",
    "answer without question": "an answer that no question precedes",
    "several questions": "more than the one question that reasoning has",
    "marks": "a mark of a chat template, such as `<image>` or `###`, which would be read as one in training",
    "betrays its source": "speaks of captions, bounding boxes or coordinates, or writes coordinates",
    "refusal": "declines, apologizes, or refers to itself as a program",
    "other language": "another language or script than the one asked for",
    "near-duplicate": "shares most of its 3-word shingles with an earlier row of its kind",
}
DUPLICATE = "near-duplicate"
CUT_OFF = "cut off"
LANGUAGES = ("English", *OTHERS)

_SEPARATOR = re.compile(r"^[ \t]*={3,}[ \t]*$", re.MULTILINE)
_HEADER = re.compile(r"^\W{0,4}(question|answer)\s*\d*\s*:\**[ \t]*", re.IGNORECASE)
_LATER_HEADER = re.compile(r"\n\W{0,4}(question|answer)\s*\d*\s*:", re.IGNORECASE)
_MARKS = re.compile(r"<image|<ImageHere>|<Img|</Img|</?s>|<\||\|>|###|\[/?INST\]|<</?SYS>>", re.IGNORECASE)
_SOURCE = re.compile(
    r"\bcaption(s|ed|ing)?\b|\bbounding[\s-]*box(es)?\b|\bcoordinates?\b"
    r"|\b(given|provided|five|input) (sentence|description|text)s?\b"
    r"|\b(sentence|description)s? (provided|given|above|mentions?|states?|says?|indicates?|suggests?)\b"
    # Numbers as the boxes have them: two in brackets, or three decimals of a share.
    r"|[\[(]\s*[01]?\.\d+\s*,\s*[01]?\.\d+|(?<![\d.])[01]\.\d{3}(?!\d)",
    re.IGNORECASE,
)
_MAX_OTHER_LETTERS, _MIN_ENGLISH, _MIN_SENTENCE_WORDS = 0.1, 0.2, 4  # as in curation's filter
_SHORT_ANSWER = 12  # words; a shorter one, such as `Red`, needs no full stop
_ENDS = ("。", "！", "？", "```")


@dataclass(frozen=True)
class Turn:
    """A question about an image and its answer."""

    question: str
    answer: str


class Refused(Exception):
    """Why an answer is refused: one of `REASONS`, and what was found."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(f"{reason}: {why}" if why else reason)
        self.reason, self.why = reason, why


def read_answer(kind: str, text: str, language: str = "English", cut_off: bool = False) -> list[Turn]:
    """
    The turns of an answer that can be trained on.

    Args:
        kind: One of `prompts.KINDS`. A description is one turn, whose question is empty; see [`with_question`].
        text: As the model wrote it.
        language: One of `LANGUAGES`.
        cut_off: Whether the limit of tokens ended it.

    Raises:
        Refused: with one of `REASONS`.
    """
    if cut_off:
        raise Refused(CUT_OFF, "at the limit of tokens")
    turns = [_description(text)] if kind == DETAIL else parse_turns(text)
    if kind == COMPLEX and len(turns) > 1:
        raise Refused("several questions", f"{len(turns)} questions")
    check_turns(turns, language)
    return turns


def parse_turns(text: str) -> list[Turn]:
    """
    The questions and answers of a text in blocks.

    Raises:
        Refused: for broken blocks, and for questions and answers that are not in turn.
    """
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise Refused("empty", "")
    blocks = [block.strip() for block in _SEPARATOR.split(text)]
    # A line of `===` before the first block or after the last one does no harm.
    blocks = blocks[1:] if not blocks[0] and len(blocks) > 1 else blocks
    blocks = blocks[:-1] if not blocks[-1] and len(blocks) > 1 else blocks
    found = [_block(block) for block in blocks]
    turns: list[Turn] = []
    question: str | None = None
    for name, content in found:
        if name == "question" and question is None:
            question = content
        elif name == "answer" and question is not None:
            turns.append(Turn(question, content))
            question = None
        elif name == "question":
            raise Refused("question without answer", f"{question!r:.60}")
        else:
            raise Refused("answer without question", f"{content!r:.60}")
    if question is not None:
        raise Refused("question without answer", f"{question!r:.60}")
    return turns


def render_turns(turns: Iterable[Turn]) -> str:
    """The blocks that [`parse_turns`] reads: what people review."""
    return "\n===\n".join(f"Question:\n{turn.question}\n===\nAnswer:\n{turn.answer}" for turn in turns)


def with_question(turns: list[Turn], questions: Sequence[str], seed: str) -> list[Turn]:
    """A description with a question drawn from a list; others as they are."""
    if turns[0].question:
        return turns
    return [Turn(random.Random(seed).choice(questions), turns[0].answer)]


def check_turns(turns: Sequence[Turn], language: str) -> None:
    """
    Checks what questions and answers say.

    Raises:
        Refused: with one of `REASONS`.
    """
    texts = [text for turn in turns for text in (turn.question, turn.answer) if text]
    for reason, pattern in (("marks", _MARKS), ("betrays its source", _SOURCE)):
        for text in texts:
            if found := pattern.search(text):
                raise Refused(reason, f"{found[0]!r:.60}")
    for turn in turns:
        verdict = says(Text(turn.answer), (*APOLOGIES, *SELF_REFERENCE))
        if not verdict.keep:
            raise Refused("refusal", verdict.why)
    _check_end(turns[-1].answer)
    for text in texts:
        if other := _other_language(text, language):
            raise Refused("other language", other)


def _description(text: str) -> Turn:
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise Refused("empty", "")
    if _SEPARATOR.search(text) or _HEADER.match(text) or _LATER_HEADER.search(text):
        raise Refused("broken blocks", "blocks in a description")
    return Turn("", text)


def _block(block: str) -> tuple[str, str]:
    header = _HEADER.match(block)
    if header is None:
        raise Refused("broken blocks", f"a block begins with {block[:40]!r}")
    name, content = header[1].lower(), block[header.end() :].strip()
    if later := _LATER_HEADER.search("\n" + content):
        raise Refused("broken blocks", f"no line of === before {later[0].strip()!r}")
    if not content:
        raise Refused("broken blocks" if name == "question" else "question without answer", f"an empty {name}")
    return name, content


def _check_end(answer: str) -> None:
    """An endpoint need not say that it cut an answer off."""
    text = Text(answer)
    if len(text.words) >= _SHORT_ANSWER and not answer.rstrip().endswith(_ENDS):
        verdict = unfinished(text)
        if not verdict.keep:
            raise Refused(CUT_OFF, verdict.why)


def _other_language(text: str, language: str) -> str:
    if language == "English":
        return not_english(Text(text), _MAX_OTHER_LETTERS, _MIN_ENGLISH, _MIN_SENTENCE_WORDS).why
    if script := other_script(text, _MAX_OTHER_LETTERS):
        return f"{script.capitalize()} letters"
    found = other_language(text, _MIN_ENGLISH)
    if found in (language, "no English") or (found is None and len(text.split()) < _SHORT_ANSWER):
        return ""  # a few words may belong to several languages
    return f"seems to be {found or 'English'}"
