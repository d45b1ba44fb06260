"""The checks of the filter: small pure functions that say whether to keep a text, and the text as they see it."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from .language import other_language, other_script, surely_english


_QUOTES = str.maketrans({"’": "'", "‘": "'", "`": "'", "´": "'", "“": '"', "”": '"', "\u00a0": " "})
_WORD = re.compile(r"[^\W_]+(?:['\-][^\W_]+)*")
_NO_WORD_MARKS = {code: " " for code in range(128) if not (chr(code).isalnum() or chr(code) in "'-")}
_SENTENCE_END = re.compile(r"[.!?…]+[\"')\]]*(?:\s+|$)")
_SENTENCE_OR_PARAGRAPH_END = re.compile(_SENTENCE_END.pattern + r"|\n\s*\n")
_ENDS_WELL = re.compile(r"[.!?][\"')\]]*$")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufeff\ud800-\udfff\ue000-\uf8ff]")
_RUN = re.compile(r"[.!?,;:\-=*~@%&#/+<>|^$–—_](?:\s?[.!?,;:\-=*~@%&#/+<>|^$–—_]){3}")
_ODD = re.compile(r"[^\w\s.,;:!?'\"()\[\]/&%$€£°+\-–—‘’“”…#@*=~]|_")
_ODD_ASCII = "<>\\^_`{|}"
_ELISION = re.compile(r"'[a-z]{3,}")
_MOJIBAKE = re.compile(r"Ã[\x80-\xbf©¨¤¶¼±³¡]|â€|Â[\xa0-\xbf]")
_MARKUP = re.compile(r"</?[a-z][^<>]{0,80}>|&(?:[a-z]{2,8}|#\d{1,6});|https?://|www\.|\\[nrtux]|```", re.IGNORECASE)
_NO_WORD = re.compile(r"[bcdfghjklmnpqrstvwxz]{7}|([^\W\d])\1{3}")  # `catchphrase` has six consonants in a row


class Verdict(NamedTuple):
    """What a check says about a text: whether to keep it, and if not, the reason, for a report."""

    keep: bool
    why: str = ""


KEEP = Verdict(True)


class Text:
    """
    A text, with what several checks look at computed once.

    Attributes:
        raw: The original text.
        stripped: Without surrounding white space, and with straight quotes.
        plain: `stripped` in lower case, with single spaces.
        sentences: Without their final punctuation; a title such as `Mr.` ends one too, which affects no check.
        sentence_words: Words in lower case, by sentence; no list is empty.
        words: All words, numbers included.
    """

    def __init__(self, raw: str) -> None:
        self.raw = raw
        stripped = raw.strip()
        self.stripped = stripped if stripped.isascii() and "`" not in stripped else stripped.translate(_QUOTES)
        self.plain = " ".join(self.stripped.lower().split())
        ends = _SENTENCE_END if "\n" not in stripped else _SENTENCE_OR_PARAGRAPH_END
        self.sentences = [part for part in ends.split(self.stripped) if part.strip()]
        self.sentence_words = [words for words in map(_words, self.sentences) if words]
        self.words = [word for words in self.sentence_words for word in words]


def _words(sentence: str) -> list[str]:
    lower = sentence.lower().replace("--", " ")
    if not lower.isascii():
        return _WORD.findall(lower)
    words = lower.translate(_NO_WORD_MARKS).split()  # the same in a third of the time
    if "'" in lower or "-" in lower:
        words = [word for word in (word.strip("'-") for word in words) if word]
    return words


def too_short(text: Text, min_words: int) -> Verdict:
    count = len(text.words)
    return KEEP if count >= min_words else Verdict(False, f"{count} words")


def too_long(text: Text, max_words: int) -> Verdict:
    count = len(text.words)
    return KEEP if count <= max_words else Verdict(False, f"{count} words")


def says(text: Text, phrases: Sequence[str], also: Sequence[str] = ()) -> Verdict:
    """Drops a text with one of the phrases, regardless of case, kind of quotes and width of spaces."""
    plain = text.plain
    for phrase in (*phrases, *also):
        if phrase in plain and _as_words(phrase).search(plain):
            return Verdict(False, f"says {phrase!r}")
    return KEEP


@lru_cache(maxsize=4096)
def _as_words(phrase: str) -> re.Pattern[str]:
    before, after = (r"(?<!\w)" if phrase[0].isalnum() else ""), (r"(?!\w)" if phrase[-1].isalnum() else "")
    return re.compile(before + re.escape(phrase) + after)


def meaningless(text: Text, max_share: float, max_word_letters: int) -> Verdict:
    """Drops control characters, broken encodings, markup, runs of one character, and strings that are not words."""
    raw = text.raw
    patterns = [(_RUN, "a run of punctuation")]
    if not raw.isascii() or not raw.replace("\n", " ").isprintable():
        patterns.insert(0, (_CONTROL, "a control character"))
    if not raw.isascii():
        patterns.append((_MOJIBAKE, "a broken encoding"))
    if any(mark in raw for mark in "<&/\\`"):
        patterns.append((_MARKUP, "markup"))
    for pattern, what in patterns:
        if found := pattern.search(raw):
            return Verdict(False, f"{what}, {found[0][:30]!r}")
    odd = len(_ODD.findall(raw)) if not raw.isascii() or any(mark in raw for mark in _ODD_ASCII) else 0
    if odd > max_share * len(raw):
        return Verdict(False, f"{odd} of {len(raw)} characters are neither letters, digits nor common punctuation")
    letters = sum(len(word) for word in text.words if not word.isdigit())
    if letters < 0.5 * len(text.stripped):
        return Verdict(False, f"only {letters} of {len(text.stripped)} characters are letters")
    longest = max(text.words, key=len, default="")
    if len(longest) > max_word_letters and max(map(len, longest.split("-"))) > max_word_letters:
        return Verdict(False, f"not a word, {longest[:30]!r}")
    odd_word = next(filter(_is_no_word, text.words), None)
    return KEEP if odd_word is None else Verdict(False, f"not a word, {odd_word[:30]!r}")


@lru_cache(maxsize=100_000)
def _is_no_word(word: str) -> bool:
    return _NO_WORD.search(word) is not None


def not_english(text: Text, max_other_letters: float, min_english: float, min_sentence_words: int) -> Verdict:
    """Drops a text with letters of another script, and one that is in another language or has such a sentence."""
    if script := other_script(text.raw, max_other_letters):
        return Verdict(False, f"{script.capitalize()} letters")
    # Most texts end here. Elisions (`l'image`) hide words of other languages from this check.
    if text.raw.isascii() and not _ELISION.search(text.plain) and surely_english(text.words, min_english):
        return KEEP
    if language := other_language(text.stripped, min_english):
        return Verdict(False, f"seems to be {language}" if language != "no English" else "too few English words")
    for sentence in text.sentences:
        if sentence.count(" ") + 1 >= min_sentence_words:
            language = other_language(sentence, min_english)
            if language and language != "no English":
                return Verdict(False, f"a sentence in {language}: {sentence.strip()[:60]!r}")
    return KEEP


def fragment(text: Text, dangling: Sequence[str]) -> Verdict:
    """Drops a text that begins in the middle of a sentence, or has a sentence that stops in its middle."""
    start = text.stripped.lstrip("\"'“‘([")
    if start and (start[0].islower() or start[0] in ",.;:!?)]}-–—/&%"):
        return Verdict(False, f"begins with {start[:20]!r}")
    for words, sentence in zip(text.sentence_words, filter(_WORD.search, text.sentences)):
        if words[-1] in dangling and sentence.rstrip()[-1:].isalpha() and sentence.rstrip()[-1].islower():
            return Verdict(False, f"a sentence ends in {' '.join(words[-3:])!r}")
    return KEEP


def unfinished(text: Text) -> Verdict:
    """Drops a text whose last sentence has no final punctuation, or trails off."""
    if not _ENDS_WELL.search(text.stripped[-10:]) or text.stripped.rstrip("\"')]").endswith(".."):
        return Verdict(False, f"ends with {text.stripped[-20:]!r}")
    return KEEP


def repeated_words(text: Text, times: int) -> Verdict:
    """Drops a text with the same word several times in a row."""
    for words in text.sentence_words:
        count = 1
        for before, word in pairwise(words):
            count = count + 1 if word == before else 1
            if count >= times:
                return Verdict(False, f"{word!r} {times} times in a row")
    return KEEP


def repeated_phrases(text: Text, longest: int, max_share: float) -> Verdict:
    """
    Drops a text with a phrase twice in a row (of two words, three times), or with many repeated 4-grams.

    A phrase is repeated within one sentence; the share is of the text's 4-grams that have occurred before.
    """
    for words in text.sentence_words:
        pairs = list(pairwise(words))
        if len(set(pairs)) < len(pairs) and (phrase := _in_a_row(words, longest)):
            return Verdict(False, f"{phrase!r} repeated")
    words = text.words
    grams = list(zip(words, words[1:], words[2:], words[3:]))
    repeats = len(grams) - len(set(grams))
    if repeats > max_share * max(len(grams), 20):
        most = max(Counter(grams).items(), key=lambda item: item[1])[0]
        return Verdict(False, f"{repeats} of {len(grams)} 4-grams repeat, such as {' '.join(most)!r}")
    return KEEP


def _in_a_row(words: list[str], longest: int) -> str | None:
    for length in range(2, longest + 1):
        needed = length * (2 if length == 2 else 1)
        matched = 0  # so many consecutive words equal the one `length` places later
        for place, (before, word) in enumerate(zip(words, words[length:]), start=1):
            matched = matched + 1 if before == word else 0
            if matched == needed:
                return " ".join(words[place - needed : place - needed + length])
    return None


def repeated_sentences(text: Text, similarity: float, min_words: int) -> Verdict:
    """Drops a text with a repeated sentence, or nearly: by the share of 2-grams that two sentences have in common."""
    seen: list[tuple[set[tuple[str, str]], list[str]]] = []
    for words in text.sentence_words:
        if len(words) < min_words:
            continue
        grams = set(zip(("", *words), (*words, "")))
        for other, others in seen:
            common = len(grams & other)
            if common and common >= similarity * (len(grams) + len(other) - common):
                return Verdict(False, f"{' '.join(words[:12])!r} again" + (", slightly changed" * (words != others)))
        seen.append((grams, words))
    return KEEP
