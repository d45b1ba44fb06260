"""The rules that score the demo's texts."""

import pytest

from transformers_minigpt4.demo.scoring import failure, named_values, right_attributes, summarize
from transformers_minigpt4.demo.world import Scene


STAR = Scene("red", "star", "large", "top", "left")
CENTRE = Scene("blue", "ring", "small", "middle", "center")
GOOD = "The picture shows a large red star. It lies in the top left of the image."


def test_all_attributes_right():
    assert right_attributes(GOOD, STAR) == {"colour": True, "shape": True, "size": True, "place": True}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("A large blue star in the top left.", "colour"),
        ("A large red and blue star in the top left.", "colour"),  # two colours: no answer at all
        ("A large red thing in the top left.", "shape"),
        ("A small red star in the top left.", "size"),
        ("A large red star in the top right.", "place"),
        ("A large red star in the left top.", "place"),
        ("A large red star in the center.", "place"),
        ("A large reddish star in the top left.", "colour"),
    ],
)
def test_wrong_attributes(text, wrong):
    right = right_attributes(text, STAR)
    assert [attribute for attribute, value in right.items() if not value] == [wrong]


def test_the_centre_has_one_name():
    assert named_values("in the center of the image")["place"] == {"center"}
    assert named_values("in the middle center")["place"] == {"center"}
    assert named_values("in the top center")["place"] == {"top center"}
    assert right_attributes("a small blue ring in the center", CENTRE)["place"]


def test_good_text_has_not_failed():
    assert failure(GOOD, STAR) is None
    # One wrong attribute is a wrong attribute, not a failed output.
    assert failure(GOOD.replace("red", "blue"), STAR) is None


@pytest.mark.parametrize(
    ("text", "ended", "kind"),
    [
        (GOOD + " The background is plain. The background is plain.", True, "repeated"),
        (GOOD + " It lies in the top left of the image.", True, "repeated"),
        ("The picture shows a red red red star in the top left of the image.", True, "repeated"),
        ("The picture shows a red star in the top in the top left of it.", True, "repeated"),
        (GOOD, False, "cut off"),
        ("The picture shows a large red star. It lies in the", True, "cut off"),
        ("red star clip art", True, "cut off"),
        ("A red star.", True, "cut off"),
        ("", True, "cut off"),
        ("The picture shows a large blue ring. It lies in the top left of the image.", True, "off-topic"),
        ("Nothing else can be seen. The overall impression is simple and calm.", True, "off-topic"),
    ],
)
def test_failures(text, ended, kind):
    assert failure(text, STAR, ended) == kind


def test_summary():
    shares = summarize([GOOD, "red star", GOOD], [STAR, STAR, CENTRE], [True, True, True])
    assert shares["colour"] == pytest.approx(2 / 3)
    assert shares["size"] == pytest.approx(1 / 3)
    assert shares["attributes"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3 + 1 / 3) / 4)
    assert (shares["repeated"], shares["cut off"], shares["off-topic"]) == pytest.approx((0, 1 / 3, 1 / 3))
    assert shares["failed"] == pytest.approx(2 / 3)


def test_summary_of_unequal_lists():
    with pytest.raises(ValueError, match="2 texts, 1 scenes"):
        summarize([GOOD, GOOD], [STAR], [True])
    with pytest.raises(ValueError, match="0 texts"):
        summarize([], [], [])
