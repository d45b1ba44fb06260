"""JSON that others wrote: whatever is wrong with it is one line, with the file's name where it is a file."""

import json
import os

import pytest

from transformers_minigpt4.bulk.caption_file import CaptionFile
from transformers_minigpt4.curation.review_files import _read
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.evaluation.evaluator import read_json as read_task_json
from transformers_minigpt4.evaluation.evaluator import read_json_lines
from transformers_minigpt4.evaluation.results import read_results
from transformers_minigpt4.utils.files import JsonLinesWriter
from transformers_minigpt4.utils.json_files import JsonText, brief, json_lines, parse_json, read_json


DEEP = b"[" * 100_000 + b"]" * 100_000
BAD = {
    "deep": (DEEP, "nested too deeply"),
    "surrogate": (rb'{"a": ["b", {"\ud800": 1}]}', "half of a character, .ud800"),
    "bytes": (b'{"a": "\xff"}', "not UTF-8: byte 0xff"),
    "digits": (b"9" * 5000, "a number of thousands of digits"),
    "text": (b"a,b", "not JSON: Expecting value"),
    "nothing": (b"", "not JSON"),
}


@pytest.mark.parametrize("bad", BAD)
def test_whatever_is_wrong_is_one_line(bad, tmp_path):
    content, said = BAD[bad]
    with pytest.raises(ValueError, match=said) as caught:
        parse_json(content)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    (tmp_path / "a.json").write_bytes(content)
    for read in (read_json, read_task_json, read_results):
        with pytest.raises(ValueError, match=rf"a\.json.*{said}"):
            read(tmp_path / "a.json")
    if content:
        (tmp_path / "a.jsonl").write_bytes(b"\n{}\n" + content + b"\n{}")
        with pytest.raises(ValueError, match=rf"line 3 of .*a\.jsonl.*{said}"):
            read_json_lines(tmp_path / "a.jsonl")
        numbers, values = zip(*json_lines(tmp_path / "a.jsonl"))
        assert numbers == (2, 3, 4) and values[::2] == ({}, {}) and isinstance(values[1], ValueError)


def test_good_json_is_read_as_it_is():
    value = {"a": [1, 2.5, None, True, "\U0001f600 é"], "b": {"c": "\0"}}
    for content in (json.dumps(value), json.dumps(value).encode(), json.dumps(value, ensure_ascii=False).encode()):
        assert parse_json(content) == value
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]


@pytest.mark.parametrize("text", ["[]", " [ ] ", '{"x": [], "a": []}'])
def test_empty_lists(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    assert list(JsonText(tmp_path / "a.json").items("a" if "a" in text else None)) == []


def test_entries_of_a_list_have_their_lines(tmp_path):
    text = '{"x": ' + DEEP.decode() + ', "a": [\n1, "b]", \n\n{"c": [2]}, {"d" 3}, [4,\n 5] 6,\n7]}'
    (tmp_path / "a.json").write_text(text)
    items = list(JsonText(tmp_path / "a.json").items("a"))
    assert [item.line for item in items] == [2, 2, 4, 4, 4, 6]
    assert [item.value for item in items if not isinstance(item.value, ValueError)] == [1, "b]", {"c": [2]}, 7]
    assert [number for number, item in enumerate(items) if isinstance(item.value, ValueError)] == [3, 4]


@pytest.mark.parametrize("text", ["", "{", "3", '{"a": 1}', '{"a"', '{"a" [1]}', '{"b": [1]', "[1", "[1,"])
def test_a_list_that_is_not_there_or_cut_short(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    for key in (None, "a"):
        with pytest.raises(ValueError, match=r"a\.json (does not contain a list|has no list|is not JSON, or was cut)"):
            list(JsonText(tmp_path / "a.json").items(key))


def test_a_value_of_any_depth_and_size_is_shown_briefly():
    value: list = []
    for _ in range(5000):
        value = [value]
    assert len(brief(value)) < 80 and len(brief("x" * 10**6)) <= 80


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for read in (read_json, read_task_json, lambda path: list(json_lines(path)), JsonText):
        with pytest.raises(OSError, match="not a regular file"):
            read(tmp_path / "a.jsonl")
    with pytest.raises(CurationError, match="not a regular file"):
        list(_read(tmp_path / "a.jsonl"))


def test_files_that_are_appended_to_survive_a_deep_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(DEEP)
    with pytest.raises(ValueError, match=r"line 1 of .* is not a caption record"), CaptionFile(path, "p", "m"):
        pass
    with JsonLinesWriter(path) as lines:
        lines.append([{"a": 1}])
    assert path.read_bytes() == b'{"a": 1}\n'
