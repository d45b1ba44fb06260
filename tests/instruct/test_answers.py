"""What of a model's answer becomes questions and answers, and what is refused, with which reason."""

import pytest

from transformers_minigpt4.instruct.answers import REASONS, Refused, Turn, parse_turns, read_answer, render_turns
from transformers_minigpt4.instruct.prompts import COMPLEX, CONVERSATION, DETAIL


TWO = "Question:\nWhat is it?\n===\nAnswer:\nA dog.\n===\nQuestion:\nWhere?\n===\nAnswer:\nOn the\n\ngrass."
ONE = "Question:\nWhy is it wet?\n===\nAnswer:\nIt seems that the dog has been swimming in the lake behind it."
LONG = "The dog sits on the grass in front of a small red house with a white door and"


def reason(kind: str, text: str, language: str = "English", **options) -> str:
    with pytest.raises(Refused) as error:
        read_answer(kind, text, language, **options)
    assert error.value.reason in REASONS
    return error.value.reason


def test_blocks_become_turns():
    turns = [Turn("What is it?", "A dog."), Turn("Where?", "On the\n\ngrass.")]
    assert read_answer(CONVERSATION, TWO) == turns == parse_turns(render_turns(turns))
    assert read_answer(CONVERSATION, f"===\n\n{TWO}\n===\n") == turns
    windows = TWO.replace("\n", "\r\n").replace("===", " ===== ")
    assert [turn.question for turn in read_answer(CONVERSATION, windows)] == ["What is it?", "Where?"]
    assert read_answer(CONVERSATION, "**Question:** What is it?\n===\n**Answer:** A dog.") == turns[:1]
    assert read_answer(COMPLEX, ONE)[0].answer.startswith("It seems")
    assert read_answer(DETAIL, " A dog lies on the grass. \n") == [Turn("", "A dog lies on the grass.")]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (CONVERSATION, "", "empty"),
        (DETAIL, " \n", "empty"),
        (CONVERSATION, "A dog lies on the grass.", "broken blocks"),
        (CONVERSATION, f"Here it is:\n{TWO}", "broken blocks"),
        (CONVERSATION, TWO.replace("\n===\nAnswer:\nA", "\nAnswer:\nA"), "broken blocks"),
        (CONVERSATION, f"{TWO}\n===\n===\n{ONE}", "broken blocks"),
        (CONVERSATION, "Question:\n\n===\nAnswer:\nA dog.", "broken blocks"),
        (DETAIL, ONE, "broken blocks"),
        (DETAIL, "A dog.\n===\nA cat.", "broken blocks"),
        (CONVERSATION, TWO.rsplit("\n===\n", 1)[0], "question without answer"),
        (CONVERSATION, f"Question:\nWhat?\n===\n{TWO}", "question without answer"),
        (CONVERSATION, "Question:\nWhat?\n===\nAnswer:\n", "question without answer"),
        (CONVERSATION, "Answer:\nA dog.", "answer without question"),
        (CONVERSATION, f"{TWO}\n===\nAnswer:\nA cat.", "answer without question"),
        (COMPLEX, TWO, "several questions"),
        (CONVERSATION, TWO.replace("A dog.", "A dog. <image>"), "marks"),
        (DETAIL, "### Scene\nA dog lies on the grass.", "marks"),
        (DETAIL, "As the caption says, a dog lies on the grass.", "betrays its source"),
        (DETAIL, "The Captions mention a dog on the grass.", "betrays its source"),
        (DETAIL, "Its bounding box is in the middle of the grass.", "betrays its source"),
        (DETAIL, "A dog at [0.32, 0.5, 0.7, 0.81] lies on the grass.", "betrays its source"),
        (DETAIL, "A dog at (0.32, 0.5) lies on the grass.", "betrays its source"),
        (DETAIL, "A dog is seen 0.325 from the left of the grass.", "betrays its source"),
        (DETAIL, "Judging by its coordinates, the dog is on the grass.", "betrays its source"),
        (DETAIL, "The provided descriptions speak of a dog on the grass.", "betrays its source"),
        (CONVERSATION, TWO.replace("Where?", "Where is its bounding-box?"), "betrays its source"),
        (DETAIL, LONG, "cut off"),
        (COMPLEX, f"Question:\nWhat is it?\n===\nAnswer:\n{LONG}", "cut off"),
        (DETAIL, "I'm sorry, but I can't help with that.", "refusal"),
        (CONVERSATION, TWO.replace("A dog.", "As an AI language model I see no image."), "refusal"),
        (DETAIL, "Ein Hund liegt auf der Wiese und schaut auf das Haus.", "other language"),
        (CONVERSATION, TWO.replace("A dog.", "Это большая собака."), "other language"),
    ],
)
def test_what_is_refused(kind, text, expected):
    assert reason(kind, text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "The dog weighs about 0.5 kg and the house is 12.5 m away from it.",
        "A sign on the house says 'Boulangerie', which is French for a bakery.",
        "Three people (two women, one man) stand behind the box with the toys.",
        "It is not clear what the person behind the window does, but she may be waiting for the bus.",
    ],
)
def test_what_is_not_refused(text):
    assert read_answer(DETAIL, text)[0].answer == text


def test_an_answer_at_the_limit_of_tokens_is_refused_although_it_ends_well():
    assert reason(DETAIL, "A dog lies on the grass.", cut_off=True) == "cut off"


def test_languages():
    german = "Ein großer Hund liegt auf der Wiese vor dem roten Haus und schaut auf die Straße."
    assert read_answer(DETAIL, german, "German")
    assert reason(
        DETAIL, "A big dog lies on the grass in front of the red house and looks at the street.", "German"
    ) == ("other language")
    blocks = f"Question:\nWas ist das?\n===\nAnswer:\n{german}"
    assert read_answer(CONVERSATION, blocks, "German") and reason(CONVERSATION, blocks) == "other language"
