"""The hard-coded rules of the filter: small pure functions from a text to keep or drop, and the data they go by."""

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from .config import CurationError, settings_hash
from .language import other_language, other_script, surely_english


VERSION = 1  # goes up when a rule's code changes what it drops
APOLOGIES = (
    # The first two are the paper's (section 3.2); the others are what such models write in their place.
    *("i'm sorry", "i apologize", "i apologise", "i am sorry", "i am so sorry", "i'm so sorry", "sorry for the"),
    *("sorry about", "my apologies", "i do apologize", "we apologize", "apologies for", "please accept my"),
    *("please forgive", "i made a mistake", "i have made a mistake", "i've made a mistake", "i made an error"),
    *(
        "my mistake",
        "i was mistaken",
        "i was wrong",
        "i misunderstood",
        "i misread",
        "let me correct",
        "i stand corrected",
    ),
)
SELF_REFERENCE = (
    *("as an ai", "i am an ai", "i'm an ai", "an ai language model", "as a language model", "as a large language"),
    *("i am a language model", "i'm a language model", "i am a large language", "as an artificial intelligence"),
    *(
        "as a text-based",
        "as a chatbot",
        "i am a chatbot",
        "i'm a chatbot",
        "as an assistant",
        "as a virtual assistant",
    ),
    *("chatgpt", "openai", "minigpt", "my training data", "i was trained", "knowledge cutoff", "my knowledge"),
    *("i cannot see", "i can't see", "i can not see", "i am unable to", "i'm unable to", "i am not able to"),
    *("i'm not able to", "i do not have the ability", "i don't have the ability", "i do not have access"),
    *("i don't have access", "i do not have enough", "i don't have enough", "i cannot provide", "i can't provide"),
    *("i cannot determine", "i cannot assist", "i can't assist", "i can't help", "please provide more"),
    *("please provide the", "let me know if", "feel free to ask", "i hope this helps", "hope this helps"),
    *("is there anything else", "how can i help", "how may i assist", "can i help you", "would you like me to"),
)
LEFTOVERS = (
    *("###", "human:", "assistant:", "<img", "</img", "<imagehere", "<imagefeature", "<image>", "[inst]", "[/inst]"),
    *("<<sys>>", "<s>", "</s>", "<unk>", "<pad>", "<|", "|>", "[imgcontent]", "<imagecontent"),
    # The paper's prompts, of generation and of repair, sentence by sentence.
    *("describe this image in detail", "give as many details as possible", "say everything you see"),
    *("fix the error in the given", "remove any repeating sentences", "not english sentences, and so on"),
    *(
        "remove unnecessary repetition",
        "rewrite any incomplete sentences",
        "return directly the",
        "without explanation",
    ),
    # How language models begin and end what they were told to return without explanation.
    *("here is the corrected", "here's the corrected", "here is the revised", "here's the revised"),
    *(
        "here is the paragraph",
        "here is the fixed",
        "here is the rewritten",
        "here is the edited",
        "corrected paragraph",
    ),
    *("revised paragraph", "given paragraph", "input paragraph", "original paragraph", "paragraph is already"),
    *("is already correct", "no corrections are", "no errors in", "the corrected version"),
)
# Words that a sentence cannot end with.
DANGLING = (
    *("a", "an", "the", "and", "or", "but", "of", "with", "from", "into", "onto", "which", "whose", "because", "than"),
    *("their", "its", "his", "my", "your", "very", "is", "are", "was", "were", "has", "have", "be", "to", "at", "as"),
)

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
_TEMPLATE = re.compile(r"#+\s*\w+:|<[^<>]*>|\[/?INST\]")
_NO_WORD = re.compile(r"[bcdfghjklmnpqrstvwxz]{7}|([^\W\d])\1{3}")  # `catchphrase` has six consonants on end


class Verdict(NamedTuple):
    """What a rule says about a text: whether to keep it, and otherwise why not, in words for a report."""

    keep: bool
    why: str = ""


KEEP = Verdict(True)


class Text:
    """
    A text with what several rules look at, each made once.

    Attributes:
        raw: As it came.
        stripped: Without white space around it, and with straight quotes.
        plain: That in lower case, with single spaces.
        sentences: Without their end marks; a title such as `Mr.` ends one too, which harms no rule.
        sentence_words: Words in lower case, by sentence; no list is empty.
        words: All of them, numbers too.
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
    words = lower.translate(_NO_WORD_MARKS).split()  # the same, in a third of the time
    if "'" in lower or "-" in lower:
        words = [word for word in (word.strip("'-") for word in words) if word]
    return words


@dataclass(frozen=True)
class Rule:
    """
    One rule.

    Args:
        name: The reason of each drop, in the project and the report.
        what: What it drops, in one sentence for docs and cards.
        check: `(text, **parameters) -> Verdict`, pure; `None` for what is judged over all pairs.
        parameters: Defaults, which a configuration may replace; `also` adds to the list before it.
    """

    name: str
    what: str
    check: Callable[..., Verdict] | None
    parameters: Mapping[str, Any]


def too_short(text: Text, min_words: int) -> Verdict:
    count = len(text.words)
    return KEEP if count >= min_words else Verdict(False, f"{count} words")


def too_long(text: Text, max_words: int) -> Verdict:
    count = len(text.words)
    return KEEP if count <= max_words else Verdict(False, f"{count} words")


def says(text: Text, phrases: Sequence[str], also: Sequence[str] = ()) -> Verdict:
    """Drops a text with one of the phrases, letter case, kind of quotes and width of spaces aside."""
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
    """Drops control characters, broken encodings, markup, runs of one character, strings that are no words."""
    raw = text.raw
    patterns = [(_RUN, "a run of marks")]
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
        return Verdict(False, f"{odd} of {len(raw)} characters are neither letters, digits nor common marks")
    letters = sum(len(word) for word in text.words if not word.isdigit())
    if letters < 0.5 * len(text.stripped):
        return Verdict(False, f"only {letters} of {len(text.stripped)} characters are letters")
    longest = max(text.words, key=len, default="")
    if len(longest) > max_word_letters and max(map(len, longest.split("-"))) > max_word_letters:
        return Verdict(False, f"no word, {longest[:30]!r}")
    odd_word = next(filter(_is_no_word, text.words), None)
    return KEEP if odd_word is None else Verdict(False, f"no word, {odd_word[:30]!r}")


@lru_cache(maxsize=100_000)
def _is_no_word(word: str) -> bool:
    return _NO_WORD.search(word) is not None


def not_english(text: Text, max_other_letters: float, min_english: float, min_sentence_words: int) -> Verdict:
    """Drops a text with other letters, and one that is, or has a sentence, in another language."""
    if script := other_script(text.raw, max_other_letters):
        return Verdict(False, f"{script.capitalize()} letters")
    # Most texts end here. Elisions (`l'image`) hide words of other languages from this look.
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
    """Drops a text whose last sentence has no end mark, or trails off."""
    if not _ENDS_WELL.search(text.stripped[-10:]) or text.stripped.rstrip("\"')]").endswith(".."):
        return Verdict(False, f"ends with {text.stripped[-20:]!r}")
    return KEEP


def repeated_words(text: Text, times: int) -> Verdict:
    """Drops one word several times on end."""
    for words in text.sentence_words:
        count = 1
        for before, word in pairwise(words):
            count = count + 1 if word == before else 1
            if count >= times:
                return Verdict(False, f"{word!r} {times} times on end")
    return KEEP


def repeated_phrases(text: Text, longest: int, max_share: float) -> Verdict:
    """
    Drops a phrase twice on end (three words and more; two words three times), and many repeated 4-grams.

    A phrase on end stays within one sentence; the share is of the text's 4-grams that occurred before in it.
    """
    for words in text.sentence_words:
        pairs = list(pairwise(words))
        if len(set(pairs)) < len(pairs) and (phrase := _on_end(words, longest)):
            return Verdict(False, f"{phrase!r} on end")
    words = text.words
    grams = list(zip(words, words[1:], words[2:], words[3:]))
    repeats = len(grams) - len(set(grams))
    if repeats > max_share * max(len(grams), 20):
        most = max(Counter(grams).items(), key=lambda item: item[1])[0]
        return Verdict(False, f"{repeats} of {len(grams)} 4-grams repeat, such as {' '.join(most)!r}")
    return KEEP


def _on_end(words: list[str], longest: int) -> str | None:
    for length in range(2, longest + 1):
        needed = length * (2 if length == 2 else 1)
        matched = 0  # so many words on end equal the word `length` places behind
        for place, (before, word) in enumerate(zip(words, words[length:]), start=1):
            matched = matched + 1 if before == word else 0
            if matched == needed:
                return " ".join(words[place - needed : place - needed + length])
    return None


def repeated_sentences(text: Text, similarity: float, min_words: int) -> Verdict:
    """Drops a sentence that comes twice, or almost: by the share of 2-grams that two sentences have in common."""
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


RULES: tuple[Rule, ...] = (
    Rule(
        "leftovers",
        "Pieces of a prompt or template, or of an answer's frame (`Here is the corrected paragraph`)",
        says,
        {"phrases": LEFTOVERS, "also": ()},
    ),
    Rule("apology", "Apologies and mistakes owned up to", says, {"phrases": APOLOGIES, "also": ()}),
    Rule(
        "self_reference",
        "The writer speaks of itself as a program, declines, or offers help",
        says,
        {"phrases": SELF_REFERENCE, "also": ()},
    ),
    Rule(
        "not_english",
        "Letters of another script, a sentence in another language, or hardly an English word",
        not_english,
        {"max_other_letters": 0.1, "min_english": 0.2, "min_sentence_words": 4},
    ),
    Rule(
        "meaningless",
        "Control characters, broken encodings, markup, runs of one character, strings that are no words",
        meaningless,
        {"max_share": 0.03, "max_word_letters": 30},
    ),
    Rule("repeated_words", "The same word `times` times on end", repeated_words, {"times": 3}),
    Rule(
        "repeated_sentences",
        "A sentence that comes again, or almost: the share of 2-grams that both have is `similarity` or more",
        repeated_sentences,
        {"similarity": 0.8, "min_words": 3},
    ),
    Rule(
        "repeated_phrases",
        "A phrase of three words or more twice on end, of two words three times; or more than `max_share` of the "
        "4-grams were there before",
        repeated_phrases,
        {"longest": 12, "max_share": 0.2},
    ),
    Rule("unfinished", "The last sentence has no end mark, or trails off in dots", unfinished, {}),
    Rule(
        "fragment",
        "Begins in the middle of a sentence, or a sentence ends in a word that asks for more",
        fragment,
        {"dangling": DANGLING},
    ),
    Rule("too_short", "Fewer than `min_words` words", too_short, {"min_words": 10}),
    Rule("too_long", "More than `max_words` words", too_long, {"max_words": 300}),
    # These two look at all pairs; `duplicates.py` applies them, the first of several alike being kept.
    Rule(
        "duplicate_text",
        "Like an earlier pair's text: the Jaccard index of their 3-word shingles is `similarity` or more",
        None,
        {"similarity": 0.8},
    ),
    Rule(
        "duplicate_picture",
        "Like an earlier pair's picture: at most `max_bits` of 64 bits of the difference hash differ, and no colour "
        "of 9 x 8 fields by more than `max_difference` of 255",
        None,
        {"max_bits": 4, "max_difference": 24},
    ),
)


class RuleSet:
    """
    The rules of one project: the defaults with what its configuration changes.

    Args:
        changes: The configuration's `rules`: by rule name, `False` to leave the rule out, or its parameters' new
            values.
        prompts: Further texts whose sentences must not be left in an answer: the project's own prompts.

    Raises:
        CurationError: for a rule or parameter that does not exist, and a value of the wrong kind.
    """

    def __init__(self, changes: Mapping[str, Any] | None = None, prompts: Iterable[str] = ()) -> None:
        changes = dict(changes or {})
        known = {rule.name: rule for rule in RULES}
        if unknown := sorted(set(changes) - set(known)):
            raise CurationError(f"there is no rule {unknown[0]!r}; the rules are {', '.join(known)}")
        self.parameters: dict[str, dict[str, Any]] = {}
        for name, rule in known.items():
            change = changes.get(name, {})
            if change is not False:
                self.parameters[name] = _changed(rule, {} if change is True or change is None else change)
        if "leftovers" in self.parameters:
            texts = (Text(_TEMPLATE.sub(". ", prompt)) for prompt in prompts)
            sentences = (_plain(sentence).strip(" .") for text in texts for sentence in text.sentences)
            long = [sentence for sentence in sentences if sentence.count(" ") >= 3]  # `Continue` is a word of English
            leftovers = self.parameters["leftovers"]
            leftovers["also"] = tuple(dict.fromkeys([*leftovers["also"], *long]))
        self._checks = [(rule, self.parameters[rule.name]) for rule in RULES if rule.name in self.parameters]

    def check(self, raw: str) -> list[tuple[str, str]]:
        """Name and reason of every rule that drops a text, in the rules' order; empty for one that is kept."""
        text = Text(raw)
        found = []
        for rule, parameters in self._checks:
            if rule.check is not None:
                verdict = rule.check(text, **parameters)
                if not verdict.keep:
                    found.append((rule.name, verdict.why))
        return found

    def digest(self) -> str:
        """Changes with every parameter, and with the lists of words that the rules go by."""
        return settings_hash(VERSION, self.parameters)

    def describe(self) -> dict[str, str]:
        """Each rule in words with its parameters, for a card; a list of phrases by its length."""
        described = {rule.name: _described(rule, parameters) for rule, parameters in self._checks}
        off = {rule.name: "not used" for rule in RULES if rule.name not in self.parameters}
        return {**described, **off}


def _plain(phrase: str) -> str:
    return Text(phrase).plain


def _changed(rule: Rule, change: Any) -> dict[str, Any]:
    if not isinstance(change, Mapping):
        raise CurationError(
            f"the rule {rule.name} has parameters ({', '.join(rule.parameters) or 'none'}), not {change!r}; "
            "give an object of these, or false to leave the rule out"
        )
    parameters = dict(rule.parameters)
    for name, value in change.items():
        if name not in parameters:
            raise CurationError(
                f"the rule {rule.name} has no parameter {name!r}; it has {', '.join(parameters) or 'none at all'}"
            )
        listed = isinstance(parameters[name], tuple)
        if listed and (
            not isinstance(value, (list, tuple)) or not all(isinstance(v, str) and v.strip() for v in value)
        ):
            raise CurationError(f"{name} of the rule {rule.name} is a list of phrases, not {value!r:.80}")
        if not listed and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
            raise CurationError(f"{name} of the rule {rule.name} is a number of 0 or more, not {value!r:.80}")
        if isinstance(parameters[name], float) and not value <= 1:
            raise CurationError(f"{name} of the rule {rule.name} is a share between 0 and 1, not {value!r}")
        if isinstance(parameters[name], int) and not isinstance(value, int):
            raise CurationError(f"{name} of the rule {rule.name} is a whole number, not {value!r}")
        parameters[name] = tuple(map(_plain, value)) if listed else value
    return parameters


def _described(rule: Rule, parameters: Mapping[str, Any]) -> str:
    values = []
    for name, value in parameters.items():
        if isinstance(value, tuple):
            if value:
                values.append(f"{len(value)} {name}" if name != "also" else f"{len(value)} more of the project's own")
        else:
            values.append(f"{name} {value:g}")
    return rule.what + (f" ({', '.join(values)})" if values else "")


def rules_table() -> str:
    """The rules with their defaults as Markdown: one table, and a list of phrases for each rule that goes by one."""
    lines = ["| rule | drops | parameters |", "| --- | --- | --- |"]
    for rule in RULES:
        values = [
            f"`{name}`" if isinstance(value, tuple) else f"`{name}` {value:g}"
            for name, value in rule.parameters.items()
        ]
        lines.append(f"| `{rule.name}` | {rule.what} | {', '.join(values)} |")
    for rule in RULES:
        for name, value in rule.parameters.items():
            if isinstance(value, tuple) and value:
                listed = ", ".join(f"`{phrase}`" for phrase in value)
                lines += ["", *textwrap.wrap(f"`{name}` of `{rule.name}`: {listed}.", 120, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"
