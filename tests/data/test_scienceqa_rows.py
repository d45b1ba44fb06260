"""ScienceQA's release: texts equal those of the authors' converter, rows that training reads, and bad files."""

import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from transformers_minigpt4.cli import app
from transformers_minigpt4.data.scienceqa import FORMATS, answer_text, question_text, training_row
from transformers_minigpt4.data.sources import open_reader, parse_source


GOLDEN = json.loads((Path(__file__).parents[1] / "llava_golden" / "scienceqa.json").read_text(encoding="utf-8"))
PROBLEMS = GOLDEN["problems"]


def write_release(folder: Path, problems: dict = PROBLEMS, split: list | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": list(problems) if split is None else split}))
    for pid, problem in problems.items():
        if isinstance(problem, dict) and problem.get("image"):
            os.makedirs(folder / "images" / "train" / pid)
            Image.new("RGB", (8, 8)).save(folder / "images" / "train" / pid / problem["image"])
    return folder


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "scienceqa", *map(str, arguments)])


@pytest.mark.parametrize("name", GOLDEN["formats"])
def test_texts_as_by_the_authors(name):
    question_format, _, answer_format = name.partition("-")
    assert name in FORMATS
    for pid, expected in GOLDEN["formats"][name].items():
        problem = PROBLEMS[pid]
        assert [question_text(problem, question_format), answer_text(problem, answer_format)] == expected


@pytest.mark.parametrize("name", GOLDEN["convert_to_llava"])
def test_rows_as_by_the_authors(name):
    for row in GOLDEN["convert_to_llava"][name]:
        assert json.dumps(training_row(row["id"], PROBLEMS[row["id"]], name)) == json.dumps(row)


def test_quirks_that_the_golden_rows_do_not_have():
    """Labels that begin a text are removed throughout it; written-out line breaks become real; letters after E."""
    problem = {**PROBLEMS["5"], "question": "Question: what   is it?", "choices": list("uvwxyz"), "answer": 5}
    problem |= {"lecture": "A\\nB", "solution": "Answer: z.", "image": None}
    question, answer = (turn["value"] for turn in training_row("5", problem)["conversations"])
    assert question == "what  is it?\nContext: N/A\nOptions: (A) u (B) v (C) w (D) x (E) y (F) z"
    assert answer == "A\nB z. The answer is F."


def test_the_rows_of_a_release_are_read_by_training(tmp_path):
    folder = write_release(tmp_path / "release")
    result = convert(folder, "--output", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows == [training_row(pid, problem) for pid, problem in PROBLEMS.items()]
    reader = open_reader(parse_source(result.stdout.splitlines()[-1]))
    assert reader.length == len(PROBLEMS)
    again = convert(folder, "--output", tmp_path / "rows.json")
    assert again.exit_code == 1 and "exists; name another --output, or give --overwrite" in again.stderr


def test_rows_without_their_image_are_left_out_and_counted(tmp_path):
    folder = write_release(tmp_path / "release")
    first = next(pid for pid, problem in PROBLEMS.items() if problem["image"])
    (folder / "images" / "train" / first / "image.png").unlink()
    result = convert(folder, "--output", tmp_path / "rows.json")
    assert result.exit_code == 0 and f"1 rows are left out, because their image is missing, such as {first}" in (
        result.stderr
    )
    assert first not in {row["id"] for row in json.loads((tmp_path / "rows.json").read_text())}


@pytest.mark.parametrize(
    "change,message",
    [
        ({"answer": 7}, "the right one is number 7"),
        ({"answer": True}, "the field 'answer' of '5'"),
        ({"choices": ["a", 1]}, "has the options"),
        ({"hint": None}, "the field 'hint' of '5' .* is None"),
        ({"lecture": 3}, "the field 'lecture' of '5' .* is not a text"),
        (None, "'5' .* is None, not a problem"),
    ],
)
def test_bad_problems(tmp_path, change, message):
    problems = {"5": None if change is None else {**PROBLEMS["5"], **change}}
    result = convert(write_release(tmp_path, problems), "--output", tmp_path / "rows.json")
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr)


@pytest.mark.parametrize(
    "arguments,split,message",
    [
        (["--split", "dev"], ["5"], "has no split 'dev', only train"),
        (["--format", "QCM-X"], ["5"], "there is no format 'QCM-X'"),
        ([], ["5", "6"], "1 of the 2 ids of the split 'train' are not in"),
        ([], ["5", "5"], "holds the id '5' twice"),
        ([], [], "is empty"),
    ],
)
def test_bad_requests(tmp_path, arguments, split, message):
    folder = write_release(tmp_path, {"5": PROBLEMS["5"]}, split)
    result = convert(folder, "--output", tmp_path / "rows.json", *arguments)
    assert result.exit_code == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "rows.json").exists()
