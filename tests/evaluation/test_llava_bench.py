"""LLaVA-Bench against the authors' scripts: requests byte for byte, scores read, summaries; and both settings."""

import json
from pathlib import Path

import pytest
from judged_files import write_lines
from scripted_endpoint import Reply, ScriptedEndpoint, user_text
from typer.testing import CliRunner

from transformers_minigpt4.cli import app
from transformers_minigpt4.evaluation.evaluator import columns_of
from transformers_minigpt4.evaluation.judging import JudgeStopped
from transformers_minigpt4.evaluation.llava_reviews import (
    TEMPERATURE,
    UNREADABLE,
    read_scores,
    summarize_reviews,
)
from transformers_minigpt4.evaluation.results import complete_records, summarize
from transformers_minigpt4.evaluation.tasks import load_task
from transformers_minigpt4.llm.opening import open_chat_model
from transformers_minigpt4.llm.types import ChatSettings


GOLDEN = json.loads((Path(__file__).parents[1] / "llava_golden" / "llava_bench.json").read_text(encoding="utf-8"))
SETTINGS = {"coco": "coco", "wild": "in_the_wild"}
ANSWERS = {str(row["question_id"]): row["text"] for row in GOLDEN["answers"]}
CATEGORIES = {"wild": "llava_bench_", "coco": ""}  # prefix of the categories in the authors' reviews


def write_data(folder: Path, setting: str) -> Path:
    coco = setting == "coco"
    names = ("qa90_questions", "qa90_gpt4_answer", "caps_boxes_coco2014_val_80")
    names = names if coco else ("questions", "answers_gpt4", "context")
    context = GOLDEN["context_coco" if coco else "context_wild"]
    for name, rows in zip(names, (GOLDEN["questions"], GOLDEN["reference"], context)):
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


def number(text: str) -> int:
    return int(text.partition("[Question]\nQuestion ")[2].partition("?")[0])


def review(body: dict) -> Reply:
    """What the golden judge says where the reference is first; scores of 5 in the other order."""
    text = user_text(body)
    if "cannot be used" in text:
        return Reply("I would rather not.")
    first = text.index("Reference answer") < text.index("Model answer")
    return Reply(GOLDEN["judge_says"][number(text)] if first else "5 5")


def scored(folder: Path, respond, answers=ANSWERS, **settings):
    task = load_task("llava_bench")
    questions = task.questions(folder)
    with (
        ScriptedEndpoint(respond) as endpoint,
        open_chat_model(ChatSettings("gpt-4-0314", base_url=endpoint.base_url, max_retries=0, **settings)) as judge,
        judge.at_temperature(task.judge_temperature),
    ):
        records = complete_records(task, questions, task.score(questions, answers, judge), answers)
    return records, summarize(task, questions, records), endpoint.requests


def printed(name: str, summary: dict) -> list[str]:
    lines = [f"{category} " + " ".join(map(str, means)) for category, means in summary.items()]
    return [name, *lines, "================================="]


@pytest.mark.parametrize("setting", SETTINGS)
def test_requests_and_scores_as_by_the_authors(tmp_path, setting):
    records, summary, requests = scored(write_data(tmp_path, setting), review)
    ours = {json.dumps(request, sort_keys=True) for request in requests}
    expected = {json.dumps(request, sort_keys=True) for request in GOLDEN[setting]["requests"]}
    assert expected and expected <= ours
    pairs = [(row["published_reference_score"], row["published_score"]) for row in records]
    assert pairs == [tuple(pair) for pair in GOLDEN[setting]["tuples"]]
    names = [CATEGORIES[setting] + row["kind"] for row in records]
    lines = GOLDEN[setting]["summary_printed"]
    assert printed(lines[0], summarize_reviews(zip(names, pairs))) == lines
    metrics = summary["metrics"]
    for line in lines[1:-1]:
        name, score, reference, model = line.split()
        kind = name.removeprefix(CATEGORIES[setting])
        metric = "published/relative_score" + ("" if kind == "all" else f"/{kind}")
        assert metrics[metric] == pytest.approx(float(score))
        if kind == "all":
            assert metrics["published/score"] * 10 == pytest.approx(float(model), abs=0.05)
            assert metrics["published/reference_score"] * 10 == pytest.approx(float(reference), abs=0.05)
    unreadable = [tuple(pair) == UNREADABLE for pair in GOLDEN[setting]["tuples"]]
    assert metrics["published/unreadable"] == pytest.approx(100 * sum(unreadable) / len(unreadable))


def test_scores_are_read_as_by_the_authors():
    for says, pair in zip(GOLDEN["judge_says"], GOLDEN["coco"]["tuples"]):
        assert (read_scores(says) or UNREADABLE) == tuple(pair), says


@pytest.mark.parametrize(
    "text", ["nan 5", "inf 5", "5 -inf", "8 9 ", "8\u00a09 7", "1 2 3", " ", "\n8 9", "8 9\r\n9 9"]
)
def test_hostile_scores(text):
    """What would spoil a mean, or is not two numbers with one space."""
    pair = read_scores(text)
    assert pair is None or (text == "8 9\r\n9 9" and pair == (8.0, 9.0))  # Python's float() takes the line's end


@pytest.mark.parametrize("ignored", [(), (0, 4)])
def test_the_summary_of_a_review_file(tmp_path, ignored):
    good = GOLDEN["good"]
    path = write_lines(tmp_path / "review_good.jsonl", good["rows"])
    lines = good["summary_ignore_0_4" if ignored else "summary_printed"]
    rows = [(r["category"], tuple(r["tuple"])) for r in good["rows"] if r["question_id"] not in ignored]
    assert printed(lines[0], summarize_reviews(rows)) == lines
    options = [word for key in ignored for word in ("--ignore", str(key))]
    result = CliRunner().invoke(app, ["evaluate", "reviews", str(path), *options])
    assert result.exit_code == 0, result.output
    cells = [[cell.strip() for cell in line.split("|")[2:6]] for line in result.stdout.splitlines()[2:]]
    assert [" ".join(row) for row in cells] == lines[1:-1]


def test_unreadable_reviews_of_a_file_are_counted(tmp_path):
    rows = [{"question_id": 1, "category": "conv", "tuple": [8, 4]}, {"category": "conv", "tuple": [-1, -1]}]
    path = write_lines(tmp_path / "review.jsonl", rows)
    result = CliRunner().invoke(app, ["evaluate", "reviews", str(path)])
    assert "1 of 2 reviews" in result.stderr and "could not be read" in result.stderr
    for bad in ({"category": "conv"}, {"tuple": [8]}, {"tuple": ["8", "9"]}, [8, 9]):
        path.write_text(json.dumps(bad) + "\n")
        result = CliRunner().invoke(app, ["evaluate", "reviews", str(path)])
        assert result.exit_code == 1 and "line 1 of" in result.stderr and len(result.stderr.splitlines()) == 1


def test_both_settings_are_named(tmp_path):
    records, summary, requests = scored(write_data(tmp_path, "coco"), lambda body: "8 4")
    # The judge gives the first place twice the points: in both orders that cancels, in one it does not.
    assert summary["metrics"]["relative_score"] == 100 and summary["metrics"]["published/relative_score"] == 50
    assert len(requests) == 2 * len(records) and {request["temperature"] for request in requests} == {TEMPERATURE}
    published, strict = load_task("llava_bench").notes
    assert published.startswith("published/") and "both orders" in strict


def test_a_review_that_was_refused_is_no_score(tmp_path):
    """Of the third pair, the endpoint refuses both reviews, of the fourth the second: not -1, and not wrong."""

    def respond(body):
        text = user_text(body)
        if "cannot be used" in text or number(text) == 2:
            return Reply(status=400)
        swapped = "[Assistant 1]\nModel" in text
        return Reply(status=400) if number(text) == 3 and swapped else Reply("8 8")

    records, summary, _ = scored(write_data(tmp_path, "coco"), respond)
    columns = columns_of(records)
    assert "published" not in records[2] and records[2]["no_review"] and records[2]["score"] is None
    assert records[3]["score"] is None and records[3]["published_score"] == 8
    assert columns["published_score"][2] != columns["published_score"][2]  # no value
    assert summary["metrics"]["published/relative_score"] == summary["metrics"]["relative_score"] == 100
    assert summary["questions"]["published/relative_score"] == len(records) - 1
    assert summary["metrics"]["no_review"] == pytest.approx(100 / len(records))


def test_no_score_of_an_endpoint_that_fails(tmp_path):
    for reply in (Reply(status=500), Reply(drop=True)):
        with pytest.raises(JudgeStopped, match="answered 0 of"):
            scored(write_data(tmp_path, "coco"), [reply])


def test_a_question_without_an_answer_scores_lowest_in_both(tmp_path):
    answers = dict(list(ANSWERS.items())[1:])
    records, _, _ = scored(write_data(tmp_path, "coco"), lambda body: "8 8", answers)
    row = records[0]
    assert (row["score"], row["published_score"]) == (1, 1) and row["published_reference_score"] == 10


@pytest.mark.parametrize("context", [{"captions": []}, {"captions": ["a"], "instances": [{"bbox": []}]}, {}])
def test_bad_contexts(tmp_path, context):
    write_data(tmp_path, "coco")
    rows = [{**row, **context} if context else {"image": row["image"]} for row in GOLDEN["context_coco"]]
    write_lines(tmp_path / "caps_boxes_coco2014_val_80.jsonl", rows)
    with pytest.raises(ValueError, match=r"has no caption|has no category or bbox"):
        load_task("llava_bench").questions(tmp_path)
