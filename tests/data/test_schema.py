"""The row format: what epochs, and one clear error for each way of being wrong."""

import pytest
from PIL import Image

from transformers_minigpt4.data.schema import DataError, answer_text, validate_row


IMAGE = Image.new("RGB", (2, 2))
USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}
AGAIN = {"role": "user", "content": [{"type": "text", "text": "And?"}]}
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
TURN = {"images": [IMAGE], "prompt": "<ImageHere>", "completion": "a dog\n"}

GOOD = {
    "one turn": TURN,
    "no image": {"images": [], "prompt": "Hello", "completion": "Hi"},
    "two images": {"images": [IMAGE] * 2, "prompt": "<ImageHere> and <ImageHere>", "completion": "x"},
    "undecoded": {**TURN, "images": [{"bytes": b"x", "path": None}]},
    "a path": {**TURN, "images": [{"bytes": None, "path": "a.jpg"}]},
    "where from": {**TURN, "key": "1", "source": "s"},
    "messages": {"images": [IMAGE], "messages": [USER, ANSWER]},
    "turns": {"images": [IMAGE], "messages": [SYSTEM, USER, ANSWER, AGAIN, ANSWER]},
}
BAD = {
    "no dict": ([], "a row is a dict"),
    "unknown key": ({**TURN, "label": 1}, r"unknown keys \['label'\]"),
    "no images": ({"prompt": "a", "completion": "b"}, "needs a list `images`"),
    "a string as image": ({**TURN, "images": ["a.jpg"]}, "an image is a PIL image"),
    "nothing as image": ({**TURN, "images": [{"bytes": None, "path": ""}]}, "an image is a PIL image"),
    "no text": ({"images": []}, "this one has \\[\\]"),
    "both": ({**TURN, "messages": [USER, ANSWER]}, "this one has"),
    "half": ({"images": [], "prompt": "a"}, r"this one has \['prompt'\]"),
    "number": ({**TURN, "completion": 3}, "are strings"),
    "empty": ({**TURN, "completion": " \n"}, "nothing to learn"),
    "no place": ({**TURN, "prompt": "Describe"}, "holds 0 <ImageHere> for 1 images"),
    "a placeholder without an image": ({**TURN, "images": []}, "holds 1 <ImageHere> for 0 images"),
    "place in the answer": ({**TURN, "completion": "<ImageHere>"}, "a text contains"),
    "no messages": ({"images": [], "messages": []}, "a list of turns"),
    "string content": ({"images": [], "messages": [{"role": "user", "content": "a"}]}, "with a list as content"),
    "no answer": ({"images": [IMAGE], "messages": [USER]}, "ending with `assistant`"),
    "order": ({"images": [IMAGE], "messages": [ANSWER, USER]}, "in turn"),
    "only a system": ({"images": [], "messages": [SYSTEM]}, "in turn"),
    "image of an assistant": (
        {"images": [IMAGE], "messages": [AGAIN, {**USER, "role": "assistant"}]},
        "cannot hold",
    ),
    "unplaced": ({"images": [IMAGE], "messages": [AGAIN, ANSWER]}, "place 0 images, and the row has 1"),
    "empty answer": ({"images": [IMAGE], "messages": [USER, {**ANSWER, "content": []}]}, "message is empty"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_rows(name):
    validate_row(GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name):
    row, message = BAD[name]
    with pytest.raises(DataError, match=message):
        validate_row(row)


def test_answer():
    assert answer_text(TURN) == "a dog\n"
    assert answer_text(GOOD["turns"]) == "A dog. A dog."
