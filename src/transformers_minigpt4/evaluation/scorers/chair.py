"""CHAIR: finds the COCO objects that a caption names, as the official script does, and those that are not there."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from transformers_minigpt4.utils.files import JsonObject

from .singular import singular


# Pairs of words that name one object, and what they count as. The official list, with its later additions: a baby or
# adult animal is not a person, nor is a passenger train, a toilet seat is not a chair, and "glass" loses its last
# letter in the singular.
_PAIRS = """
    motor bike,motor cycle,air plane,traffic light,street light,traffic signal,stop light,fire hydrant,stop sign,
    parking meter,suit case,sports ball,baseball bat,baseball glove,tennis racket,wine glass,hot dog,cell phone,
    mobile phone,teddy bear,hair drier,potted plant,bow tie,laptop computer,home plate,train track
"""
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"
_COUNTS_AS: dict[tuple[str, str], str] = {
    **{tuple(pair.split()): " ".join(pair.split()) for pair in _PAIRS.split(",")},  # type: ignore[misc]
    **{(age, animal): animal for animal in _ANIMALS.split() for age in ("baby", "adult")},
    **{("passenger", vehicle): vehicle for vehicle in ("jet", "train")},
    ("bow", "tie"): "tie",
    ("toilet", "seat"): "toilet",
    ("wine", "glas"): "wine glass",
}
_FIRST_WORDS = frozenset(first for first, _ in _COUNTS_AS)

# Only words matter as tokens; all other tokens merely separate words, so a comma replaces each of them.
# A full stop ends a sentence before white space, closing marks in between or not, and before most other marks.
_FULL_STOP = re.compile(r"(?<=[^.])\.(?=[])}>\"'»”’]*(?:\s|$)|[;*:@({\[!?])")
_COMMA = re.compile(r"[,:](\D|$)")
_SEPARATOR = re.compile(r"[;@#$%&?!*()\[\]{}<>\"`«»“”‘’„]|--|\.\.+|''")
_SUFFIX = re.compile(r"(?<=[^' ])(?:'(?:s|m|d|ll|re|ve)?|n't)(?= )")


def split_words(text: str) -> list[str]:
    """
    The words of a caption, in lower case, as NLTK's `word_tokenize` splits them; punctuation and `'s` become `","`.

    As there, words joined by `-` or `/`, or by a full stop without space, stay one. NLTK keeps the full stop of its
    156 abbreviations ("dr."), none of which names an object; here it is removed.
    """
    text = _FULL_STOP.sub(" , ", text.lower())
    text = _COMMA.sub(r" , \1", text)
    text = _SEPARATOR.sub(" , ", text)
    if "'" in text:
        text = _SUFFIX.sub(" , ", f" {text} ")
    return text.split()


class _Singulars(dict[str, str]):
    """Singular forms by word, each computed once."""

    def __missing__(self, word: str) -> str:
        self[word] = form = singular(word)
        return form


@dataclass(frozen=True)
class Mention:
    """An object that a caption names: the word (singular, or a pair), and the COCO category that it stands for."""

    word: str
    category: str


class ObjectWords:
    """
    Finds the objects that captions name.

    Args:
        synonyms: Text of the official `synonyms.txt`: one line per COCO category, words separated by comma and space,
            the category first. It is split as in the official script: a word after two spaces keeps one, and so is
            never found.

    Raises:
        ValueError: if the text has another format.
    """

    def __init__(self, synonyms: str) -> None:
        self.category: dict[str, str] = {}
        for line in synonyms.strip().splitlines():
            words = line.strip().split(", ")
            if not words[0]:
                raise ValueError(
                    "the list of synonyms has an empty line or one without category; each line is a COCO category and "
                    "its synonyms, separated by ', '"
                )
            self.category.update(dict.fromkeys(words, words[0]))
        if not self.category:
            raise ValueError("the list of synonyms is empty; take synonyms.txt of the official CHAIR repository")
        self.digest = hashlib.sha256(synonyms.encode()).hexdigest()
        self._singulars = _Singulars()
        self._of_interest = self.category.keys() | _FIRST_WORDS

    def mentions(self, caption: str) -> list[Mention]:
        """The objects of a caption, in order, each as often as it is named."""
        singulars, of_interest = self._singulars, self._of_interest
        words = [singulars[word] for word in split_words(caption)]
        found: list[str] = []
        taken = -1
        for place, word in enumerate(words):
            if word in of_interest and place != taken:
                if word in _FIRST_WORDS and place + 1 < len(words):
                    pair = _COUNTS_AS.get((word, words[place + 1]))
                    if pair is not None:
                        word, taken = pair, place + 1
                if word in self.category:
                    found.append(word)
        # "The seat of the toilet" is not a chair either.
        if "toilet" in found and "seat" in found:
            found = [word for word in found if word != "seat"]
        return [Mention(word, self.category[word]) for word in found]

    def categories_of(self, instances: JsonObject, captions: JsonObject) -> dict[int, frozenset[str]]:
        """
        The objects that are there, by image: the categories of its instances and those that its captions name.

        Args:
            instances: COCO's `instances_*.json`.
            captions: COCO's `captions_*.json`.

        Raises:
            ValueError: if the list of synonyms lacks a category.
        """
        names = {row["id"]: row["name"] for row in instances["categories"]}
        unknown = sorted(set(names.values()) - self.category.keys())
        if unknown:
            raise ValueError(
                f"the list of synonyms lacks the categories {', '.join(unknown)} of the instances; use the official "
                "synonyms.txt with COCO's own instances"
            )
        categories = {number: self.category[name] for number, name in names.items()}
        there: defaultdict[int, set[str]] = defaultdict(set)
        for row in instances["annotations"]:
            there[row["image_id"]].add(categories[row["category_id"]])
        for row in captions["annotations"]:
            there[row["image_id"]].update(mention.category for mention in self.mentions(row["caption"]))
        return {image: frozenset(found) for image, found in there.items()}


def hallucinations(mentions: Iterable[Mention], there: Iterable[str]) -> list[Mention]:
    """The mentioned objects that are not there."""
    present = frozenset(there)
    return [mention for mention in mentions if mention.category not in present]
