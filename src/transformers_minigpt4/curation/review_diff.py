"""Shows how two texts differ, word by word."""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby


# Words of one text times words of the other, common beginnings and ends left out: about 40 ms. `difflib` needs half a
# second for 240 words that repeat themselves, which raw captions do.
_MAX_CELLS = 150_000
_PIECES = re.compile(r"(\w+|[^\w\s])(\s*)")


def mark_differences(before: str, after: str, escape: Callable[[str], str]) -> tuple[str, str]:
    """
    HTML of two texts: words that only the first has are in `<del>`, those that only the second has in `<ins>`.

    Unchanged words are a longest common subsequence. If that would take too long (about 390 words against 390 others),
    everything between the common beginning and the common end counts as changed.

    Args:
        before: The older text.
        after: The newer text.
        escape: Turns text into HTML; everything of either text goes through it.
    """
    old, new = _split(before), _split(after)
    kept = list(_common([word for word, _ in old], [word for word, _ in new]))
    return _mark(old, {i for i, _ in kept}, "del", escape), _mark(new, {j for _, j in kept}, "ins", escape)


def _split(text: str) -> list[tuple[str, str]]:
    """Words and punctuation, each with the white space after it; leading white space is a piece without a word."""
    pieces = _PIECES.findall(text)
    start = text[: len(text) - len(text.lstrip())]
    return [("", start), *pieces] if start else pieces


def _mark(pieces: Sequence[tuple[str, str]], kept: set[int], tag: str, escape: Callable[[str], str]) -> str:
    parts = []
    for same, group in groupby(range(len(pieces)), lambda index: index in kept):
        text = "".join(word + space for word, space in (pieces[index] for index in group))
        shown = text.rstrip()
        changed = not same and shown
        parts.append(f"<{tag}>{escape(shown)}</{tag}>{escape(text[len(shown) :])}" if changed else escape(text))
    return "".join(parts)


def _common(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Positions of a longest common subsequence."""
    start, end = 0, 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        yield start, start
        start += 1
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
        yield len(old) - end, len(new) - end
    old, new = old[start : len(old) - end], new[start : len(new) - end]
    if len(old) * len(new) > _MAX_CELLS:
        return
    # lengths[i][j]: how many words old[i:] and new[j:] have in common.
    lengths = [[0] * (len(new) + 1)]
    for word in reversed(old):
        below, row, last = lengths[-1], [0], 0
        for j in range(len(new) - 1, -1, -1):
            last = below[j + 1] + 1 if word == new[j] else max(last, below[j])
            row.append(last)
        lengths.append(row[::-1])
    lengths.reverse()
    i = j = 0
    while i < len(old) and j < len(new):
        if old[i] == new[j]:
            yield start + i, start + j
            i, j = i + 1, j + 1
        elif lengths[i + 1][j] >= lengths[i][j + 1]:
            i += 1
        else:
            j += 1
