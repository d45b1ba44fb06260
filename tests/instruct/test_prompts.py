"""The messages are LLaVA's byte for byte, boxes are printed as theirs, and rows are chosen by shares."""

import hashlib
import json
from collections import Counter

import pytest
from instruct_projects import make_config, write_coco

from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.data.readers import BadRow
from transformers_minigpt4.instruct.answers import parse_turns, read_answer, render_turns
from transformers_minigpt4.instruct.prompts import (
    COMPLEX,
    CONVERSATION,
    DETAIL,
    KINDS,
    PROMPTS,
    detail_questions,
    messages,
)
from transformers_minigpt4.instruct.sampling import choose_rows
from transformers_minigpt4.instruct.scenes import clipped, read_scenes


# SHA-256 of the files of the authors' repository, each in a line of its name, at commit c121f04.
DIGEST = "8498395d533219d46a7249452784615c7572b82648ce58eb52833279c00d061b"


def test_the_files_are_the_authors():
    digest = hashlib.sha256()
    for path in sorted(PROMPTS.glob("*/*.txt")):
        digest.update(f"{path.parent.name}/{path.name}\n".encode() + path.read_bytes())
    assert digest.hexdigest() == DIGEST
    assert "c121f0432da27facab705978f83c4ada465e46fd" in (PROMPTS / "NOTICE.txt").read_text()
    assert "Apache License" in (PROMPTS / "LICENSE.txt").read_text()
    assert len(detail_questions()) == 16 and detail_questions()[0] == "Describe the following image in detail"


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_byte_for_byte_the_authors(kind):
    captions, boxes = ["A red bicycle.", "a bike"], ["bicycle: [0.287, 0.641, 0.507, 0.874]"]
    asked = messages(kind, captions, boxes)
    examples = 2 if kind == CONVERSATION else 3
    assert [message["role"] for message in asked] == ["system", *["user", "assistant"] * examples, "user"]
    files = ["system_message.txt"]
    files += [f"{n:03d}_{part}.txt" for n in range(examples) for part in ("caps", "conv")]
    for name, message in zip(files, asked):
        assert (PROMPTS / kind / name).read_bytes() == message["content"].encode()
    query = "A red bicycle.\na bike" + ("" if kind == CONVERSATION else f"\n\n{boxes[0]}")
    assert asked[-1]["content"] == query


def test_a_query_is_written_as_in_the_examples(tmp_path):
    """The boxes of the first example of reasoning come out of a file as they are in the example."""
    example = (PROMPTS / COMPLEX / "000_caps.txt").read_bytes().decode()
    captions, _, boxes = example.partition("\n\n")
    record = {"image": "a.jpg", "captions": captions.split("\n"), "boxes": []}
    for line in boxes.split("\n"):
        category, _, corners = line.partition(": ")
        record["boxes"].append({"category": category, "box": json.loads(corners)})
    (tmp_path / "own.jsonl").write_text(json.dumps(record) + "\n")
    (scene,) = read_scenes(tmp_path / "own.jsonl", None)
    assert messages(COMPLEX, scene.captions, list(map(str, scene.boxes)))[-1]["content"] == example


@pytest.mark.parametrize("kind", KINDS)
def test_the_examples_pass_the_check(kind):
    for path in sorted((PROMPTS / kind).glob("*_conv.txt")):
        turns = read_answer(kind, path.read_bytes().decode())
        assert len(turns) == (1 if kind != CONVERSATION else 4 if path.name.startswith("000") else len(turns))
        if kind != DETAIL:
            assert parse_turns(render_turns(turns)) == turns


def test_another_language_is_asked_for_after_the_system_message():
    system = messages(CONVERSATION, ["a"], [], "German")[0]["content"]
    assert system.startswith(messages(CONVERSATION, ["a"], [])[0]["content"] + "\n\n") and "German" in system


def test_boxes_are_clipped():
    assert clipped((-5, -5, 320, 900), 640, 480) == (0.0, 0.0, 0.5, 1.0)
    assert str(list(clipped((-0.0, 115.2, 136.96, 480), 640, 480))) == "[0.0, 0.24, 0.214, 1.0]"
    assert clipped((640, 0, 700, 10), 640, 480) is None and clipped((5, 5, 5, 9), 640, 480) is None


def test_coco(tmp_path):
    captions, instances, _ = write_coco(tmp_path, images=3, without_boxes=1)
    scenes = list(read_scenes(captions, instances))
    assert [scene.key for scene in scenes] == ["000000000001", "000000000002", "000000000003"]
    assert scenes[0].captions == tuple(f"Scene 1: {w} view." for w in ("first", "second", "third", "fourth", "fifth"))
    assert [str(box) for box in scenes[0].boxes] == ["fire hydrant: [0.1, 0.0, 0.6, 0.5]"] and not scenes[2].boxes
    assert [scene.boxes for scene in read_scenes(captions, None)] == [()] * 3


def test_bad_entries_cost_only_themselves(tmp_path):
    good = {"image": "a/b.jpg", "caption": "one\ntwo"}
    bad = {
        "no caption": {"image": "x.jpg", "captions": [" "]},
        "below the folder": {"image": "../x.jpg", "caption": "a"},
        "not a list": {"image": "x.jpg", "captions": "a"},
        "width` and `height": {"image": "x.jpg", "caption": "a", "boxes": [{"category": "b", "box": [1, 2, 30, 40]}]},
        "x1, y1": {"image": "x.jpg", "caption": "a", "boxes": [{"category": "b", "box": [1, 2, "3", 4]}]},
        "not the path": {"caption": "a"},
        "category": {"image": "x.jpg", "caption": "a", "boxes": ["b"]},
    }
    pixels = {
        "image": "c.jpg",
        "caption": "c",
        "width": 200,
        "height": 100,
        "boxes": [{"category": "d", "box": [20, 10, 400, 50]}],
    }
    lines = [good, *bad.values(), pixels, good]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot JSON\n")
    found = list(read_scenes(tmp_path / "own.jsonl", None))
    assert found[0].key == "a/b" and found[0].captions == ("one two",)
    assert [str(box) for box in found[8].boxes] == ["d: [0.1, 0.1, 1.0, 0.5]"]
    for words, row in zip(bad, found[1:8]):
        assert isinstance(row, BadRow) and words in row.reason, (words, row)
    assert found[9].kind == "duplicate" and "not JSON" in found[10].reason


def test_rows_follow_the_shares_and_a_larger_limit_adds_to_a_smaller_one(tmp_path):
    config = make_config(tmp_path, "http://127.0.0.1:1/v1", images=30, without_boxes=2, limit=40)
    rows, bad = choose_rows(config)
    assert Counter(row.kind for row in rows) == {CONVERSATION: 15, DETAIL: 6, COMPLEX: 19}
    assert len(set(rows)) == 40 and {row.kind for row in bad} == {"boxes"} and len(bad) == 2
    fewer, _ = choose_rows(make_config(tmp_path, "http://x", images=30, without_boxes=2, limit=7))
    assert fewer == rows[:7]
    every, _ = choose_rows(make_config(tmp_path, "http://x", images=30, without_boxes=2))
    assert Counter(row.kind for row in every)[COMPLEX] == 28 and every[:40] == rows
    other, _ = choose_rows(make_config(tmp_path, "http://x", images=30, without_boxes=2, limit=40, seed=1))
    assert other != rows
    only, _ = choose_rows(make_config(tmp_path, "http://x", images=30, limit=99, kinds={CONVERSATION: 1}))
    assert len(only) == 30 and {row.kind for row in only} == {CONVERSATION}


def test_boxes_are_needed_for_two_kinds(tmp_path):
    config = make_config(tmp_path, "http://x", images=3, without_boxes=3)
    with pytest.raises(CurationError, match=r"need boxes, and .* has none"):
        choose_rows(config)


def test_a_file_that_is_not_cocos_is_refused_in_one_line(tmp_path):
    path = tmp_path / "captions.json"
    for content, words in (
        ('{"images": [{"id": 1', "cut short"),
        ("[]", "in place of '{'"),
        ("", "end of the file"),
        ('{"images": [], "annotations": []}', "lists no images"),
        ('{"images": [1]}', "not COCO's format"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words) as error:
            list(read_scenes(path, None))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
