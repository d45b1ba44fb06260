"""Scorers of short answers against golden cases of the official scripts: VQA's forms, choices, yes and no."""

import json
import time
from pathlib import Path

import pytest

from transformers_minigpt4.evaluation.scorers.choices import parse_choice, parse_choice_as_llava
from transformers_minigpt4.evaluation.scorers.pope import is_clear, says_yes
from transformers_minigpt4.evaluation.scorers.vqa_text import direct_answer_score, normalize_answer


GOLDEN = Path(__file__).parent / "golden"
CABS = ["skateboarder", "train", "delivery", "cab"]


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def test_normalised_answers_are_the_official_ones():
    cases = golden("vqa_text.json")
    assert len(cases) > 50
    assert {case["text"]: normalize_answer(case["text"]) for case in cases} == {
        case["text"]: case["normalised"] for case in cases
    }


def test_direct_answers_score_a_third_for_each_match():
    references = ["coat"] * 2 + ["jacket"] * 7 + ["scarf"]
    scores = [direct_answer_score(answer, references) for answer in ("coat", "jacket", "scarf", "hat")]
    assert scores == pytest.approx([2 / 3, 1, 1 / 3, 0])


@pytest.mark.parametrize(
    "answer,chosen",
    [
        ("D", 3),
        ("d", 3),
        ("D.", 3),
        ("(D)", 3),
        ("D) cab", 3),
        ("(d) a cab", 3),
        ("D: cab", 3),
        ("  D\n", 3),
        ("Answer: D", 3),
        ("The correct answer is (D) cab.", 3),
        ("The answer is D because he waits.", 3),
        ("He waits at the kerb. The answer is D.", 3),
        ("cab", 3),
        ("A cab.", 3),
        ("The answer is: cab", 3),
        ("Answer: the CAB", 3),
        # None of these names exactly one option by letter or text.
        ("", None),
        ("A man waits for a cab", None),
        ("I think it is D", None),
        ("cab or train", None),
        ("E", None),
        ("The answer is A. The answer is B.", None),
        ("A taxi", None),
        ("B or D", None),
        ("Delivery service", None),
        ("Dunno", None),
    ],
)
def test_choices_are_read_strictly(answer, chosen):
    assert parse_choice(answer, CABS) == chosen


def test_options_that_are_letters_or_alike():
    assert (
        parse_choice("a", ["b", "a"]) == 0
    )  # a letter alone is the option of that letter, as in the official reading
    assert parse_choice("the dog", ["dog", "a dog"]) is None
    assert parse_choice("2", ["one", "two"]) == 1
    assert parse_choice("Y", ["X", "Y"]) == 1


def test_llavas_reading_of_choices():
    cases = golden("llava_choices.json")
    for case in cases:
        number = -1 if (read := parse_choice_as_llava(case["answer"], case["options"])) is None else read
        assert number == case["reads"], case
        # Whatever that reading takes, the strict one takes alike.
        if number >= 0 and case["answer"] != "The answer is Apple.":
            assert parse_choice(case["answer"], case["options"]) == number, case


def test_yes_and_no_as_popes_script_reads_them():
    rows = golden("pope.json")["rows"]
    assert ["yes" if says_yes(row["answer"]) else "no" for row in rows] == [row["says"] for row in rows]
    assert [text for text in ("Yes.", "a dog", "It is NOT", "knot", "") if is_clear(text)] == ["Yes.", "It is NOT"]


def test_a_hundred_thousand_answers_in_seconds():
    answers = [f"The {number} red dogs, number {number}!" for number in range(100_000)]
    start = time.process_time()
    assert len({normalize_answer(answer) for answer in answers}) == 100_000
    assert time.process_time() - start < 5
