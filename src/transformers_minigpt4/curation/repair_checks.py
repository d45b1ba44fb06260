"""Compares a repaired text with its source by simple rules, and flags what a person should look at."""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

from .language import other_language, other_script
from .phrases import APOLOGIES, LEFTOVERS, SELF_REFERENCE
from .text_checks import Text, says


VERSION = 1  # goes up when the checks change what they flag
# What each flag means.
FLAGS = {
    "added facts": "words or numbers that the source does not have",
    "other language": "in another language or script than the source",
    "ballooned": "much longer than the source",
    "collapsed": "much shorter than what the source says once",
    "markup": "HTML, Markdown or code fences",
    "leftovers": "pieces of the prompt, or a preface such as `Here is the corrected paragraph`",
    "refusal": "apologizes, declines or refers to itself, although the source does not",
    "cut off": "ended by the limit of tokens",
}

# Longer than this many times the source, plus this many words to complete a sentence.
_LONGEST, _MORE_WORDS = 1.25, 10
# Shorter than this share of the source without repetitions.
_SHORTEST = 0.5
_MAX_OTHER_LETTERS, _MIN_ENGLISH = 0.1, 0.2  # as in the filter
# A corrected spelling (`buildng`) is not a new word; in a shorter word, one letter may make another word (`bed`).
_SAME_WORD, _MIN_LETTERS = 0.85, 6
_PREFACE = re.compile(
    r"^\W*(sure|certainly|of course|okay|here is|here's|here are)\b[^.!?\n]{0,80}[:!]", re.IGNORECASE
)
_MARKUP = re.compile(
    r"</?[a-z][^<>]{0,200}>|&(?:[a-z]{2,8}|#\d{1,6});|```|\*\*|__|^\s*(?:#{1,6}|[*\-•])\s", re.I | re.M
)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# Endings, with how many letters must be left: `forest` is not a form of `for`, nor `early` of `ear`.
_ENDINGS = {
    **dict.fromkeys(("ingly", "edly", "ings", "ing", "ies", "ied", "ed", "es"), 3),
    **dict.fromkeys(("iest", "ier", "est", "ers", "er", "ly"), 4),
}
_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_NUMBERS |= {"thirty": "30", "forty": "40", "fifty": "50", "hundred": "100", "thousand": "1000", "pair": "2"}
# Words that state no fact. Negations and words of place are not among them: they change facts.
_EMPTY_WORDS = """
a an the this that these those it its they them their theirs he him his she her hers we us our you your i my me there
here who whom whose which what where when while how as if so than then and or but nor yet also too both either each
every all some any other another such own same one ones
is are was were be been being am do does did done has have had having can could may might will would shall should must
of in on at by for from to into onto with about along
few several many various make makes making made give gives giving located situated positioned placed
seem seems seemed appear appears appeared look looks looking show shows showing shown depict depicts depicting depicted
feature features featuring contain contains containing include includes including see seen visible present consist
consists consisting describe describes described
picture image photo photograph scene overall additionally furthermore moreover however together well just very
"""
_EMPTY = frozenset(_EMPTY_WORDS.split())


def flags(source: str, repaired: str, prompt: str = "") -> dict[str, str]:
    """
    What a person should look at in a repaired text.

    Swapped facts are not detected (`a red cup and a blue plate` for `a blue cup and a red plate`).

    Args:
        source: The text before.
        repaired: The text after.
        prompt: The model's prompt, whose sentences must not be repeated.

    Returns:
        `dict[str, str]`: for each of [`FLAGS`] that applies, what was found; empty for a text without objections.
    """
    before, after = Text(source), Text(repaired)
    found = {
        "leftovers": _leftovers(before, after, prompt),
        "markup": _match(_MARKUP, source, repaired),
        "refusal": _refusal(before, after),
        "other language": _other_language(source, repaired),
        "ballooned": _ballooned(before, after),
        "collapsed": _collapsed(before, after),
        "added facts": ", ".join(added_words(source, repaired)),
    }
    return {name: what for name, what in found.items() if what}


def added_words(source: str, repaired: str) -> list[str]:
    """
    Content words and numbers of a repaired text that its source does not have, in order, each once.

    Other forms of a word (`stands`, `standing`), numbers as digits (`two`, `2`) and corrected spellings do not count.
    """
    words = set(_words(source))
    stems = {_stem(word) for word in words}
    added: dict[str, str] = {}
    for word in _words(repaired):
        stem = _stem(word)
        if word not in _EMPTY and stem not in stems and stem not in added and not _respelt(word, words):
            added[stem] = word
    return list(added.values())


def _words(text: str) -> list[str]:
    return [word.removesuffix("'s") for word in _WORD.findall(text.lower().replace("’", "'"))]


def _stem(word: str) -> str:
    """A word without its ending, roughly: forms of one word should have the same stem, different words should not."""
    if word in _NUMBERS:
        return _NUMBERS[word]
    for ending, left in _ENDINGS.items():
        if word.endswith(ending) and len(word) - len(ending) >= left:
            word = word[: -len(ending)] + ("y" if ending.startswith("ie") else "")
            break
    else:
        if word.endswith("s") and not word.endswith("ss") and len(word) > 3:
            word = word[:-1]
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiouls":  # `sitting`
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word[-1] == "e" else word  # `riding`, `ride`


def _respelt(word: str, known: Iterable[str]) -> bool:
    """Whether a word differs from one of the source by a letter or two."""
    if len(word) < _MIN_LETTERS or not word.isalpha():
        return False
    near = (other for other in known if other[:1] == word[0] and abs(len(other) - len(word)) <= 2)
    return any(SequenceMatcher(None, word, other, autojunk=False).ratio() >= _SAME_WORD for other in near)


def _leftovers(before: Text, after: Text, prompt: str) -> str:
    sentences = [sentence.strip(" .").lower() for sentence in Text(prompt).sentences]
    asked = tuple(Text(sentence).plain for sentence in sentences if sentence.count(" ") >= 3)
    found = says(after, LEFTOVERS, asked)
    if not found.keep and says(before, LEFTOVERS, asked) != found:
        return found.why
    return _match(_PREFACE, before.stripped, after.stripped)


def _refusal(before: Text, after: Text) -> str:
    found = says(after, (*APOLOGIES, *SELF_REFERENCE))
    return "" if found.keep or not says(before, (*APOLOGIES, *SELF_REFERENCE)).keep else found.why


def _match(pattern: re.Pattern[str], source: str, repaired: str) -> str:
    found = (match[0].strip() for match in pattern.finditer(repaired))
    return next((repr(piece[:60]) for piece in found if piece not in source), "")


def _other_language(source: str, repaired: str) -> str:
    language = _language(repaired)
    return language if language and language != _language(source) else ""


def _language(text: str) -> str:
    """The language or script of a text that is not English; `""` for English."""
    script = other_script(text, _MAX_OTHER_LETTERS)
    return script.capitalize() if script else other_language(text, _MIN_ENGLISH) or ""


def _ballooned(before: Text, after: Text) -> str:
    old, new = len(before.words), len(after.words)
    return f"{new} words from {old}" if new > _LONGEST * old + _MORE_WORDS else ""


def _collapsed(before: Text, after: Text) -> str:
    old, new = before.words, len(after.words)
    # For endless repetitions of a few words, the words count; for repeated sentences, the 3-grams.
    once = min(len(set(zip(old, old[1:], old[2:]))) + 2, 2 * len(set(old)))
    return f"{new} words from {len(old)}, about {once} without repetition" if new < _SHORTEST * once else ""
