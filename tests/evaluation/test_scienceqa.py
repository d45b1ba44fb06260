"""ScienceQA against the authors' scripts: answers read, ensembles, the text-only model; files, commands, bad input."""

import json
from pathlib import Path

import pytest
from judged_files import write_image
from scripted_endpoint import Reply, ScriptedEndpoint
from typer.testing import CliRunner, Result

from transformers_minigpt4.cli import app
from transformers_minigpt4.data.scienceqa import training_question
from transformers_minigpt4.evaluation.judging import JudgeStopped
from transformers_minigpt4.evaluation.results import complete_records, summarize
from transformers_minigpt4.evaluation.scienceqa_ensembles import JUDGE_PROMPT_NOTE, combine, reference, two_shot
from transformers_minigpt4.evaluation.scienceqa_files import ensemble, read_answers, write_answers
from transformers_minigpt4.evaluation.scorers.choices import parse_choice_as_llava
from transformers_minigpt4.evaluation.tasks import load_task
from transformers_minigpt4.llm.opening import open_chat_model
from transformers_minigpt4.llm.types import ChatSettings


GOLDEN = json.loads((Path(__file__).parents[1] / "llava_golden" / "scienceqa.json").read_text(encoding="utf-8"))
PROBLEMS = GOLDEN["problems"]
OWN = {pid: row["text"] for pid, row in GOLDEN["our"].items()}
TEXT = GOLDEN["gpt4"]
JUDGED = {pid: row["text"] for pid, row in GOLDEN["requery"].items()}
ROWS = GOLDEN["ensembles_by_row"]
# The authors' columns, with ours.
COLUMNS = {
    "complement_correct": "complement_correct",
    "complement_correct_requery_script": "complement_correct",
    "upper_bound": "upper_bound_correct",
    "gpt4_no_answer": "text_no_answer",
    "our_correct": "own_correct",
    "gpt4_correct": "text_correct",
    "judge_correct": "judge_correct",
    "judge_index": "judge",
}


def combined(pid: str) -> dict:
    return combine(reference(PROBLEMS[pid], []), OWN[pid], TEXT[pid], JUDGED.get(pid))


@pytest.fixture
def release(tmp_path) -> Path:
    """The golden problems as a release; the first two are the training split, too."""
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "problems.json").write_text(json.dumps(PROBLEMS))
    splits = {"train": list(PROBLEMS)[:2], "test": GOLDEN["split"]}
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    for pid, problem in PROBLEMS.items():
        if problem["image"]:
            write_image(folder / "test" / pid / problem["image"])
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", "scienceqa", *map(str, arguments)])


@pytest.mark.parametrize("pid", GOLDEN["split"])
def test_an_answer_is_read_as_by_eval_science_qa(pid):
    number = parse_choice_as_llava(OWN.get(pid, "FAILED"), PROBLEMS[pid]["choices"])
    assert (-1 if number is None else number) == GOLDEN["eval_science_qa"]["index"][pid]


def test_the_accuracy_of_eval_science_qa(release):
    task = load_task("scienceqa")
    questions = task.questions(release)
    records = complete_records(task, questions, task.score(questions, OWN), OWN)
    metrics = summarize(task, questions, records)["metrics"]
    assert metrics["accuracy/llava_script"] == pytest.approx(GOLDEN["eval_science_qa"]["acc"])
    right = [record["id"] for record in records if record["correct_as_llava"]]
    assert right == [pid for pid in GOLDEN["split"] if pid in GOLDEN["eval_science_qa"]["correct"]]
    with_image = [p for p in GOLDEN["split"] if PROBLEMS[p]["image"]]
    share = 100 * len(set(right) & set(with_image)) / len(with_image)
    assert metrics["accuracy/llava_script/context/image"] == pytest.approx(share)


@pytest.mark.parametrize("name", COLUMNS)
def test_ensembles_row_by_row(name):
    """Every row that the authors' scripts decide without chance."""
    expected = {pid: row[name] for pid, row in ROWS.items() if row[name] is not None}
    assert {pid: combined(pid)[COLUMNS[name]] for pid in expected} == expected and expected


def test_what_the_authors_draw_at_random_is_unanswered():
    """A row without a value in one of their columns has an unanswered part, which counts as wrong."""
    for pid, row in ROWS.items():
        record = combined(pid)
        for theirs, ours in {"our_correct": "own", "gpt4_correct": "text", "complement_correct": "complement"}.items():
            if row[theirs] is None:
                assert record[ours] is None and record[f"{ours}_unanswered"] and not record[f"{ours}_correct"]


def test_ensembles_without_chance(tmp_path, release):
    golden = GOLDEN["ensembles_without_chance"]
    (release / "pid_splits.json").write_text(json.dumps({"train": [], "test": golden["split"]}))
    results = ensemble(release, OWN, TEXT, tmp_path / "out", judged=JUDGED)
    found = results["as_published"]
    total = f"Total: {len(golden['split'])}"
    no_answer = results["text_no_answer"]
    share = 100 * no_answer / len(golden["split"])

    def line(name: str, key: str) -> str:
        return f"{total}, {name}: {round(found[key] * found['questions'] / 100)}, Accuracy: {found[key]:.2f}%"

    random = f"{total}, GPT-4 NO-ANS (RANDOM): {no_answer}, Percentage: {share:.2f}%"
    assert golden["complement_printed"] == [
        line("Correct", "complement"),
        line("Correct (upper)", "upper_bound"),
        random,
    ]
    printed = list(golden["judge_printed"])
    # Of GPT-4 alone this script draws what it cannot read, in these rows, too.
    drawn = int(printed.pop(1).partition("GPT-4-Correct: ")[2].partition(",")[0])
    right = round(found["text"] * found["questions"] / 100)
    assert right <= drawn <= right + results["unanswered"]["text"]
    assert printed == [
        line("Our-Correct", "own"),
        random,
        line("GPT-4-OursVisual-Correct", "complement"),
        line("Requery-Correct", "judge"),
        line("Correct upper", "upper_bound"),
    ]
    assert found["judge"] == pytest.approx(golden["judge_result"])


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("gpt4_two_shot_")])
def test_the_text_models_messages_are_the_authors(name):
    shots = [PROBLEMS[pid] for pid in GOLDEN["two_shot"]["shots"]]
    prompt_format = name.removeprefix("gpt4_two_shot_")
    assert two_shot(PROBLEMS[GOLDEN["two_shot"]["test"]], shots, prompt_format) == GOLDEN[name]


def test_prompts_are_the_converters_without_the_image():
    """What is asked is what was learned: the human turn of a training row."""
    for rows in (GOLDEN["convert_to_llava"][name] for name in ("QCM-LEA", "CQM-A")):
        form = "QCM" if rows is GOLDEN["convert_to_llava"]["QCM-LEA"] else "CQM"
        for row in rows:
            asked = row["conversations"][0]["value"].removesuffix("\n<image>")
            assert training_question(PROBLEMS[row["id"]], form) == asked


def respond(body):
    """The text model's and the judge's golden answers, found by the question's number."""
    last = body["messages"][-1]
    asked = last["content"] if last["role"] == "user" else body["messages"][-2]["content"]
    pid = asked.partition("thing is number ")[2].partition("?")[0]
    if pid not in TEXT:
        return Reply(status=400)  # refused; no text
    return Reply(JUDGED.get(pid, "Hm.") if "Two assistants" in asked else TEXT[pid] or " ")


def test_from_an_endpoint_to_the_ensembles(tmp_path, release):
    """The commands, with an endpoint that says what the golden files hold; a second call asks nothing."""
    write_answers(tmp_path / "own.jsonl", OWN)
    with ScriptedEndpoint(respond) as endpoint:
        judge = ["--release", release, "--judge", "gpt-4", "--judge-url", endpoint.base_url, "--judge-retries", 0]
        for _ in range(2):
            done = run("text", "--output", tmp_path / "text.jsonl", *judge)
            assert done.exit_code == 0, done.output
        first = len(endpoint.requests)
        # The refused question is asked again, all others are known.
        assert first == len(GOLDEN["split"]) + len(set(GOLDEN["split"]) - TEXT.keys()) + list(TEXT.values()).count("")
        assert endpoint.requests[0]["messages"][-1] == {"role": "assistant", "content": "Answer:"}
        done = run("ensemble", tmp_path / "own.jsonl", tmp_path / "text.jsonl", "--output", tmp_path / "out", *judge)
        assert done.exit_code == 0, done.output
        asked = endpoint.requests[first:]
    results = json.loads((tmp_path / "out" / "ensemble.json").read_text())
    texts = read_answers(tmp_path / "text.jsonl")
    differ = [pid for pid in OWN if combine(reference(PROBLEMS[pid], []), OWN[pid], texts[pid])["text"] is not None]
    assert results["judge_asked"] == len(asked) and {row["temperature"] for row in asked} == {0}
    assert results["judge_asked"] <= len(differ) + 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "ensemble.jsonl").read_text().splitlines()]
    complement = {row["id"]: row["complement_correct"] for row in rows}
    expected = {pid: row["complement_correct"] for pid, row in ROWS.items() if row["complement_correct"] is not None}
    assert {pid: complement[pid] for pid in expected} == expected
    assert JUDGE_PROMPT_NOTE in results["notes"] and f"note: {JUDGE_PROMPT_NOTE}" in done.stdout
    assert results["own_missing"] == len(set(GOLDEN["split"]) - OWN.keys()) and "count as wrong" in done.stderr
    assert results["accuracy"]["own"]["all"] == pytest.approx(
        100 * sum(row["own_correct"] for row in rows) / len(GOLDEN["split"])
    )


def test_in_one_run(release):
    """`evaluate run --judge` gives the same ensembles as the files."""
    task = load_task("scienceqa")
    questions = task.questions(release)
    with (
        ScriptedEndpoint(respond) as endpoint,
        open_chat_model(ChatSettings("gpt-4", base_url=endpoint.base_url, max_retries=0)) as judge,
    ):
        records = complete_records(task, questions, task.score(questions, OWN, judge), OWN)
    metrics = summarize(task, questions, records)["metrics"]
    for name, row in ROWS.items():
        if row["complement_correct"] is not None:
            assert next(r for r in records if r["id"] == name)["complement_correct"] == row["complement_correct"]
    assert metrics["ensemble/complement"] == pytest.approx(
        100 * sum(record["complement_correct"] for record in records) / len(questions)
    )
    assert "ensemble/judge/subject/natural" in metrics and metrics["ensemble/judge/unanswered"] > 0
    short = load_task("scienceqa_short")
    assert short.sentence("B") == short.sentence("B. boron") == "The answer is B." and short.sentence("b") == "b"


def test_no_ensemble_of_an_endpoint_that_fails(release):
    task = load_task("scienceqa")
    questions = task.questions(release)
    with (
        ScriptedEndpoint([Reply(status=500)]) as endpoint,
        open_chat_model(ChatSettings("gpt-4", base_url=endpoint.base_url, max_retries=0)) as judge,
        pytest.raises(JudgeStopped, match="answered 0 of"),
    ):
        task.score(questions, OWN, judge)


def test_the_text_model_needs_its_examples(release):
    (release / "pid_splits.json").write_text(json.dumps({"train": [], "test": GOLDEN["split"]}))
    done = run(
        "text", "--release", release, "--output", release / "text.jsonl", "--judge", "m", "--judge-url", "http://x"
    )
    assert done.exit_code == 1 and "hold none; give the official files" in done.stderr


def test_files_of_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    write_answers(path, {"4": "a", "5": ""})
    assert read_answers(path) == {"4": "a", "5": ""}
    path.write_text('{"id": "4", "key": "k", "answer": "a", "reference": {}}\n{"id": "5", "error": "no image"}\n')
    assert read_answers(path) == {"4": "a"}
    (tmp_path / "gpt4.json").write_text(json.dumps({"outputs": {"4": "a"}, "acc": 82.7}))
    assert read_answers(tmp_path / "gpt4.json") == {"4": "a"}


@pytest.mark.parametrize(
    "content,message",
    [
        ('{"question_id": 4}\n', "line 1 of .* not an answer; a line has question_id and text"),
        ('{"question_id": 4, "text": 5}\n', "line 1 of .* not an answer"),
        ("[4]\n", "line 1 of .* not an answer"),
        ("half a line", "line 1 of .* not an answer"),
        ('{"question_id": 4, "text": "a"}\n{"question_id": "4", "text": "a"}\n', "line 2 of .* repeats the question"),
    ],
)
def test_bad_files_of_answers(tmp_path, content, message):
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_answers(path)


def test_bad_requests(tmp_path, release):
    write_answers(tmp_path / "own.jsonl", OWN)
    write_answers(tmp_path / "other.jsonl", {"no such question": "The answer is A."})
    base = ["--release", release, "--output", tmp_path / "out"]
    for arguments, message in (
        (["own.jsonl", "other.jsonl"], "no question of the split 'test' is answered in both files"),
        (["own.jsonl", "none.jsonl"], "none.jsonl: No such file"),
        (["own.jsonl", "own.jsonl", "--judge", "m", "--judge-answers", "own.jsonl"], "leave one out"),
        (["own.jsonl", "own.jsonl", "--judge-url", "http://x"], "--judge-url is given without --judge"),
        (["own.jsonl", "own.jsonl", "--split", "dev"], "has no split 'dev', only train, test"),
    ):
        words = [tmp_path / word if str(word).endswith("jsonl") else word for word in arguments]
        done = run("ensemble", *words, *base)
        assert done.exit_code == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.output
