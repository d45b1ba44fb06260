"""The filter's rules: which checks there are, with their defaults, and what a project changes in them."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from transformers_minigpt4.utils.files import JsonObject

from .config import settings_hash
from .phrases import APOLOGIES, DANGLING, LEFTOVERS, SELF_REFERENCE
from .settings_file import CurationError
from .text_checks import (
    Text,
    Verdict,
    fragment,
    meaningless,
    not_english,
    repeated_phrases,
    repeated_sentences,
    repeated_words,
    says,
    too_long,
    too_short,
    unfinished,
)


VERSION = 1  # goes up when the code of a check changes what it drops
_TEMPLATE = re.compile(r"#+\s*\w+:|<[^<>]*>|\[/?INST\]")


@dataclass(frozen=True)
class Rule:
    """
    One rule.

    Args:
        name: The reason given for each drop, in the project and the report.
        what: What it drops, in one sentence for docs and cards.
        check: `(text, **parameters) -> Verdict`, pure; `None` for rules that compare all pairs.
        parameters: Defaults, which a configuration may replace; `also` adds to `phrases`.
    """

    name: str
    what: str
    check: Callable[..., Verdict] | None
    parameters: JsonObject


RULES: tuple[Rule, ...] = (
    Rule(
        "leftovers",
        "Pieces of a prompt or template, or of an answer's frame (`Here is the corrected paragraph`)",
        says,
        {"phrases": LEFTOVERS, "also": ()},
    ),
    Rule("apology", "Apologies and admitted mistakes", says, {"phrases": APOLOGIES, "also": ()}),
    Rule(
        "self_reference",
        "The writer refers to itself as a program, declines, or offers help",
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
        "Control characters, broken encodings, markup, runs of one character, strings that are not words",
        meaningless,
        {"max_share": 0.03, "max_word_letters": 30},
    ),
    Rule("repeated_words", "The same word `times` times in a row", repeated_words, {"times": 3}),
    Rule(
        "repeated_sentences",
        "A sentence that is repeated, or nearly: the share of common 2-grams is `similarity` or more",
        repeated_sentences,
        {"similarity": 0.8, "min_words": 3},
    ),
    Rule(
        "repeated_phrases",
        "A phrase of three words or more twice in a row, of two words three times; or more than `max_share` of the "
        "4-grams are repetitions",
        repeated_phrases,
        {"longest": 12, "max_share": 0.2},
    ),
    Rule("unfinished", "The last sentence has no final punctuation, or trails off in dots", unfinished, {}),
    Rule(
        "fragment",
        "Begins in the middle of a sentence, or a sentence ends in a word that cannot end one",
        fragment,
        {"dangling": DANGLING},
    ),
    Rule("too_short", "Fewer than `min_words` words", too_short, {"min_words": 10}),
    Rule("too_long", "More than `max_words` words", too_long, {"max_words": 300}),
    # These two compare all pairs; see `duplicates.py`. The first of several similar pairs is kept.
    Rule(
        "duplicate_text",
        "Similar to an earlier pair's text: the Jaccard index of their 3-word shingles is `similarity` or more",
        None,
        {"similarity": 0.8},
    ),
    Rule(
        "duplicate_image",
        "Similar to an earlier pair's image: at most `max_bits` of 64 bits of the difference hash differ, and no "
        "color of 9 x 8 fields by more than `max_difference` of 255",
        None,
        {"max_bits": 4, "max_difference": 24},
    ),
)


class RuleSet:
    """
    The rules of one project: the defaults, changed by its configuration.

    Args:
        changes: The configuration's `rules`: by rule name, `False` to leave the rule out, or new values of its
            parameters.
        prompts: Further texts whose sentences must not be left in an answer: the project's own prompts.

    Raises:
        CurationError: for a rule or parameter that does not exist, and a value of the wrong type.
    """

    def __init__(self, changes: Mapping[str, object] | None = None, prompts: Iterable[str] = ()) -> None:
        changes = dict(changes or {})
        known = {rule.name: rule for rule in RULES}
        if unknown := sorted(set(changes) - set(known)):
            raise CurationError(f"there is no rule {unknown[0]!r}; the rules are {', '.join(known)}")
        self.parameters: dict[str, JsonObject] = {}
        for name, rule in known.items():
            change = changes.get(name, {})
            if change is not False:
                self.parameters[name] = _changed(rule, {} if change is True or change is None else change)
        if "leftovers" in self.parameters:
            texts = (Text(_TEMPLATE.sub(". ", prompt)) for prompt in prompts)
            sentences = (_plain(sentence).strip(" .") for text in texts for sentence in text.sentences)
            long = [sentence for sentence in sentences if sentence.count(" ") >= 3]  # not `Continue`, an ordinary word
            leftovers = self.parameters["leftovers"]
            leftovers["also"] = tuple(dict.fromkeys([*leftovers["also"], *long]))
        self._checks = [(rule, self.parameters[rule.name]) for rule in RULES if rule.name in self.parameters]

    def check(self, raw: str) -> list[tuple[str, str]]:
        """Name and reason of every rule that drops a text, in the rules' order; empty if the text is kept."""
        text = Text(raw)
        found = []
        for rule, parameters in self._checks:
            if rule.check is not None:
                verdict = rule.check(text, **parameters)
                if not verdict.keep:
                    found.append((rule.name, verdict.why))
        return found

    def digest(self) -> str:
        """Changes with every parameter, the lists of phrases included."""
        return settings_hash(VERSION, self.parameters)

    def describe(self) -> dict[str, str]:
        """Each rule in words with its parameters, for a card; of a list of phrases, the length."""
        described = {rule.name: _described(rule, parameters) for rule, parameters in self._checks}
        off = {rule.name: "not used" for rule in RULES if rule.name not in self.parameters}
        return {**described, **off}


def _plain(phrase: str) -> str:
    return Text(phrase).plain


def _changed(rule: Rule, change: object) -> JsonObject:
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


def _described(rule: Rule, parameters: JsonObject) -> str:
    values = []
    for name, value in parameters.items():
        if isinstance(value, tuple):
            if value:
                values.append(f"{len(value)} {name}" if name != "also" else f"{len(value)} more of the project's own")
        else:
            values.append(f"{name} {value:g}")
    return rule.what + (f" ({', '.join(values)})" if values else "")
