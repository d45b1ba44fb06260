"""CHAIR against golden cases of the official script: singular forms, words found, what is there, and both scores."""

import json
import time
from pathlib import Path

import pytest

from transformers_minigpt4.evaluation.scorers.chair import ObjectWords, hallucinations, split_words
from transformers_minigpt4.evaluation.scorers.singular import singular


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "chair.json").read_text(encoding="utf-8"))


def test_singular_forms_are_the_official_ones():
    cases = json.loads((GOLDEN / "singular.json").read_text(encoding="utf-8"))
    assert len(cases) > 150
    assert {word: singular(word) for word in cases} == cases


def test_words_found_are_the_official_ones(golden):
    words = ObjectWords(golden["synonyms"])
    for row in golden["rows"]:
        mentions = words.mentions(row["caption"])
        assert [mention.word for mention in mentions] == row["words"], row["caption"]
        assert [mention.category for mention in mentions] == row["categories"], row["caption"]


def test_objects_that_are_there_and_scores(golden):
    words = ObjectWords(golden["synonyms"])
    there = words.categories_of(golden["instances"], golden["captions"])
    assert {str(image): sorted(objects) for image, objects in there.items()} == golden["objects"]
    mentioned = wrong = sentences = 0
    for row in golden["rows"]:
        mentions = words.mentions(row["caption"])
        found = hallucinations(mentions, there[row["image_id"]])
        assert [mention.category for mention in found] == [
            category for category in row["categories"] if category not in golden["objects"][str(row["image_id"])]
        ]
        assert int(bool(found)) == row["chair_s"]
        assert (len(found) / len(mentions) if mentions else 0) == pytest.approx(row["chair_i"])
        mentioned, wrong, sentences = mentioned + len(mentions), wrong + len(found), sentences + bool(found)
    assert wrong / mentioned == pytest.approx(golden["chair_i"])
    assert sentences / len(golden["rows"]) == pytest.approx(golden["chair_s"])


def test_known_oddities_of_the_official_rules(golden):
    """By hand, so that a reader sees what the golden file holds."""
    words = ObjectWords(golden["synonyms"])
    named = lambda text: [(mention.word, mention.category) for mention in words.mentions(text)]  # noqa: E731
    assert named("a bus") == []  # its singular is "bu"
    assert named("two buses") == [("bus", "bus")]
    assert named("baby cat, adult cat, baby") == [("cat", "cat"), ("cat", "cat"), ("baby", "person")]
    assert named("passenger train") == [("train", "train")]
    assert named("train tracks") == []
    assert named("the seat of the toilet") == [("toilet", "toilet")]
    assert named("wine glasses") == [("wine glass", "wine glass")]
    assert named("a cheesecake") == []  # the list has two spaces in front of it


def test_splitting():
    words = split_words('A cat. "Dogs" (two): the cat\'s man-made, 5,000 things... ok/no.')
    assert " ".join(words) == "a cat , , dogs , , two , , the cat , man-made , 5,000 things , ok/no ,"


@pytest.mark.parametrize(
    "text,said", [("", "is empty"), ("cat, kitten\n\ndog", "empty line"), (", kitten", "without category")]
)
def test_lists_of_another_form(text, said):
    with pytest.raises(ValueError, match=said):
        ObjectWords(text)


def test_categories_that_the_list_lacks(golden):
    words = ObjectWords("cat, kitten\n")
    with pytest.raises(ValueError, match=r"lacks the categories airplane, bear.*official synonyms\.txt"):
        words.categories_of(golden["instances"], golden["captions"])


def test_captions_by_the_thousand(golden):
    words = ObjectWords(golden["synonyms"])
    caption = (
        "A man rides a brown horse along the beach, two dogs run beside them and a boat is near the bird's nest. "
    )
    captions = [f"{number} {caption * 2}" for number in range(10_000)]  # 40,000 take four times as long
    start = time.process_time()
    assert {len(words.mentions(text)) for text in captions} == {10}
    assert time.process_time() - start < 3
