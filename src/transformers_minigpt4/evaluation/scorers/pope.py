"""Reads yes or no from an answer as the official POPE script does."""

import re


_YES_OR_NO = re.compile(r"\b(?:yes|no|not)\b", re.IGNORECASE)


def says_yes(answer: str) -> bool:
    """
    Whether an answer counts as yes.

    The official rule: of the text before the first full stop, commas removed and split at single spaces, the words
    `No`, `not` and `no` mean no, and everything else means yes, whatever it says.
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not any(word in ("No", "not", "no") for word in words)


def is_clear(answer: str) -> bool:
    """Whether an answer contains yes, no or not; the official rule takes one that does not for a yes."""
    return _YES_OR_NO.search(answer) is not None
