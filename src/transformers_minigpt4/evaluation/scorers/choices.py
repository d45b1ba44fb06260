"""Reads which option an answer to a multiple choice question names, strictly: by letter or by the option's text."""

import re
from collections.abc import Sequence

from .vqa_text import normalize_answer


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# "Answer:", "The correct answer is", "Option", "My choice is:" and the like before what counts.
_LEAD = re.compile(
    r"(?:(?:the|my|so,? the|therefore,? the)\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)\b"
    r"(?:\s+(?:is|would be))?\s*:?\s*",
    re.IGNORECASE,
)
# A letter counts if it stands alone, or if a mark follows it: "B", "(B)", "B.", "B) a cab", "(b): a cab". The
# bare word in "A dog" or "I think" does not.
_LETTER = re.compile(r"\(([A-Za-z])\)|([A-Za-z])(?=[.):](?:\s|$)|$)")
# The phrase that ScienceQA's and LLaVA's scripts look for anywhere, if it occurs once.
_THE_ANSWER_IS = re.compile(r"The answer is \(?([A-Z])(?![A-Za-z])")
_OFFICIAL = re.compile(r"The answer is ([A-Z]).")
SCRIPT_OPTIONS = "ABCDE"  # LLaVA's scripts know no more


def parse_choice(answer: str, options: Sequence[str]) -> int | None:
    """
    The option that an answer names.

    An answer counts if, after an optional "The answer is" or the like, it (1) begins with an option's letter that
    stands alone or is followed by `.`, `)` or `:`; or (2) says "The answer is X" always with the same
    letter; or (3) is the text of exactly one option, compared as VQA answers are. Everything else names
    none, and counts as wrong.

    Args:
        answer: The model's answer.
        options: At most 26, named A, B, C and so on in this order.

    Returns:
        The number of the option, from 0; `None` if the answer names none.
    """
    text = answer.strip()
    said = set(_THE_ANSWER_IS.findall(text))
    if len(said) > 1 and not _LETTER.match(text):
        return None
    lead = _LEAD.match(text)
    core = text[lead.end() :] if lead else text
    match = _LETTER.match(core)
    letters = [match[1] or match[2]] if match else list(said)
    if letters:
        number = LETTERS.index(letters[0].upper())
        if number < len(options):
            return number
    forms = [normalize_answer(option) for option in options]
    for candidate in (text, core):
        named = [number for number, form in enumerate(forms) if form and form == normalize_answer(candidate)]
        if len(named) == 1:
            return named[0]
    return None


def parse_choice_as_llava(answer: str, options: Sequence[str]) -> int | None:
    """
    The option that LLaVA's ScienceQA script reads from an answer, for a figure that compares with published ones.

    It takes the letter alone, `"B. "` at the beginning, or exactly one `"The answer is B."` anywhere (with any
    character after the letter), only in capitals and exactly as written here; options A to E.
    """
    letter = read_letter(answer) or said_letter(answer)
    if letter is None or letter not in SCRIPT_OPTIONS[: len(options)]:
        return None
    return SCRIPT_OPTIONS.index(letter)


def read_letter(answer: str) -> str | None:
    """The letter that an answer is, or begins with in the form `"B. "`; options A to E, as in LLaVA's script."""
    alone = answer in tuple(SCRIPT_OPTIONS)
    return answer[0] if alone or (answer[:1] in tuple(SCRIPT_OPTIONS) and answer[1:3] == ". ") else None


def said_letter(text: str) -> str | None:
    """The letter of "The answer is X." with any character but a line break at its end, if it is said exactly once."""
    letters: list[str] = _OFFICIAL.findall(text)
    return letters[0] if len(letters) == 1 else None
