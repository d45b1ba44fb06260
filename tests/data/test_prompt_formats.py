"""Captions and prompts are exactly the authors'."""

import json
from collections import Counter

import pytest
from golden_model import GOLDEN

from transformers_minigpt4.data.prompt_formats import (
    INSTRUCTIONS,
    LLAMA2,
    LLAVA_INSTRUCTIONS,
    draw_instruction,
    normalize_caption,
    render,
    stage1_row,
    stage2_row,
)
from transformers_minigpt4.data.schema import DataError, validate_row


BLIP = json.loads((GOLDEN / "extras.json").read_text())["blip_caption"]


@pytest.mark.parametrize("raw,expected", BLIP["cases"])
def test_captions_are_those_of_blip(raw, expected):
    assert normalize_caption(raw) == expected


@pytest.mark.parametrize("raw,expected", [("a\n", "a"), ("\ta", "\ta"), ("a \n", "a"), (" . ", ""), ("a\tb", "a\tb")])
def test_which_whitespace_goes(raw, expected):
    assert normalize_caption(raw) == expected


def test_stage_1_has_no_prompt(golden, pictures):
    case = golden["cases"]["stage1"]
    for answer, expected in zip(case["answer"], case["rows"]):
        row = stage1_row([pictures[0]], answer)
        validate_row(row)
        assert row["prompt"] == "<ImageHere>"
        assert row["completion"] == expected["answer_text"]


def test_stage_2_prompts(golden, pictures):
    case = golden["cases"]["stage2"]
    for prompt, answer, expected in zip(case["instruction_input"], case["answer"], case["rows"]):
        instruction = next(text for text in INSTRUCTIONS if text in prompt)
        row = stage2_row([pictures[0]], answer, instruction)
        validate_row(row)
        assert (row["prompt"], row["completion"]) == (prompt, expected["answer_text"])
    shared = golden["cases"]["stage2_shared"]["prompt_list"][0]
    assert stage2_row([pictures[0]], "x", INSTRUCTIONS[1])["prompt"] == shared


def test_the_llama_2_format(pictures):
    row = stage2_row(pictures[:1], "A dog.", INSTRUCTIONS[0], LLAMA2)
    assert row["prompt"] == "[INST] <Img><ImageHere></Img> Describe this image in detail. [/INST] "
    assert row["completion"] == "A dog.</s>"
    assert render("stage2_llama2", pictures[:1], "A dog.", None, INSTRUCTIONS[0]) == row


def test_instructions_are_drawn_evenly_and_again_the_same():
    drawn = [draw_instruction("stage2", 7, "source", number) for number in range(2000)]
    assert drawn == [draw_instruction("stage2", 7, "source", number) for number in range(2000)]
    assert drawn != [draw_instruction("stage2", 8, "source", number) for number in range(2000)]
    # Four standard deviations of a binomial with n = 2000, p = 1/4.
    assert all(abs(Counter(drawn)[text] - 500) < 80 for text in INSTRUCTIONS)


def test_llavas_stage_1_asks_one_of_its_eleven_questions():
    drawn = Counter(draw_instruction("llava_v0", 7, "source", number) for number in range(2200))
    assert set(drawn) == set(LLAVA_INSTRUCTIONS) and len(drawn) == 11
    # Four standard deviations of a binomial with n = 2200, p = 1/11.
    assert all(abs(count - 200) < 54 for count in drawn.values())


def test_formats_that_a_row_cannot_have(pictures):
    with pytest.raises(DataError, match="several turns do not fit the prompt format 'stage2'"):
        render("stage2", pictures[:1], None, [], "")
    with pytest.raises(DataError, match="with 0 images"):
        render("stage1", [], "text", None, "")
    with pytest.raises(DataError, match="nothing is left of the caption"):
        render("stage1", pictures[:1], "...", None, "")
