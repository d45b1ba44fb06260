"""Normalises short answers as the official VQA evaluation does, and scores them against several references."""

import re
from collections.abc import Sequence
from functools import lru_cache


# The punctuation that the official script removes, in the version of VQA v2 (2017 and later).
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ANY_PUNCTUATION = re.compile("[" + re.escape(_PUNCTUATION) + "]")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The script means "not between digits", but what it runs drops every full stop that no digit follows.
_STOP_WITHOUT_DIGIT = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))
} | {"none": "0", "ten": "10"}
# The contractions whose apostrophe the script puts back. Its table holds each form with exactly one apostrophe left
# out ("dont", "couldnt've", "couldn'tve"), so the full forms are enough.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_RESTORED = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTIONS.split()
    for place, mark in enumerate(form)
    if mark == "'"
}
# The one entry of the script's table that goes the other way.
_RESTORED["somebody'd"] = "somebodyd"


@lru_cache(maxsize=200_000)
def normalize_answer(text: str) -> str:
    """
    An answer as the official VQA evaluation normalizes it for comparison.

    In this order: line breaks and tabs become spaces; punctuation is dropped next to a space, or anywhere if the
    answer contains a comma between digits, and becomes a space otherwise; full stops are dropped unless a digit
    follows; then lower case, number words up to ten become digits, articles are dropped, apostrophes are restored.

    Example:

    ```python
    >>> from transformers_minigpt4.evaluation.scorers.vqa_text import normalize_answer

    >>> normalize_answer("The two dogs don't play, I think.")
    "2 dogs don't play i think"
    ```
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    if _ANY_PUNCTUATION.search(text):
        given = text
        digits = _DIGIT_COMMA_DIGIT.search(given) is not None
        for mark in _PUNCTUATION:
            if mark in given:
                text = text.replace(mark, "" if digits or mark + " " in given or " " + mark in given else " ")
    if "." in text:
        text = _STOP_WITHOUT_DIGIT.sub("", text)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def direct_answer_score(answer: str, references: Sequence[str]) -> float:
    """
    A-OKVQA's score of a direct answer: a third for each of the (ten) references that equals it, at most 1.

    This is the official script's comparison, letter by letter; give normalized texts for a comparison of those.
    """
    return min(1.0, sum(answer == reference for reference in references) / 3)
