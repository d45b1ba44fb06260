"""Checks `minigpt4 evaluate`: run and compare, what they print and write, judges, and one line for each error."""

import json
import shutil
import sys
from pathlib import Path

import evaluation_files
import pytest
from evaluation_files import Letters, write_letters
from scripted_endpoint import Reply, ScriptedEndpoint
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from transformers_minigpt4 import cli
from transformers_minigpt4.evaluation import run as running
from transformers_minigpt4.evaluation import tasks
from transformers_minigpt4.evaluation.evaluator import Metric, mean
from transformers_minigpt4.evaluation.judging import YES_NO, judge_all


@pytest.fixture(autouse=True)
def loud_libraries():
    """Give the other tests the messages back that the command silences."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)


class JudgedLetters(Letters):
    """The same questions, and a judge says whether an answer pleases."""

    name = "judged_letters"
    judge_prompts = {"please": "Does this please you? {answer}"}
    metrics = (Metric("pleasing", True, "%", mean("pleasing", scale=100)),)
    primary = "pleasing"
    needs_judge = True

    def score(self, questions, answers, judge=None):
        prompts = ((q.id, f"Does {q.id} please you? {answers[q.id]}") for q in questions)
        verdicts = judge_all(judge, prompts, YES_NO)
        return [{"pleasing": verdicts[question.id].value} for question in questions]


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    """Two tasks of the tests among those of the package."""
    monkeypatch.setattr(evaluation_files, "JudgedLetters", JudgedLetters, raising=False)
    monkeypatch.setitem(sys.modules, f"{tasks.__name__}.letters", evaluation_files)
    monkeypatch.setitem(tasks.TASKS, "letters", ("letters", "Letters"))
    monkeypatch.setitem(tasks.TASKS, "judged_letters", ("letters", "JudgedLetters"))


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture
def data(tmp_path) -> Path:
    return write_letters(tmp_path / "data", rows=6)


def evaluate(*arguments) -> Result:
    return CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])


def complaint(*arguments) -> str:
    """The one line of an error."""
    result = evaluate(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("minigpt4: ")]
    return line


def test_evaluate_leaves_results_beside_the_checkpoint(checkpoint, data):
    result = evaluate(checkpoint, "--tasks", "letters", "--data", data, "--limit", 5)
    assert result.exit_code == 0, result.output
    entry = json.loads((checkpoint / "results.json").read_text())["tasks"]["letters"]
    assert entry["samples"] == 5 and entry["run"]["limit"] == 5
    value = f"{entry['metrics']['accuracy']:.4g} ["
    assert any("| letters" in line and f"| {value}" in line for line in result.stdout.splitlines())
    assert f"results in {checkpoint / 'results.json'}" in result.stderr
    spelled_out = evaluate("run", checkpoint, "--tasks", "letters", "--data", f"letters={data}", "--limit", 5)
    assert (spelled_out.exit_code, spelled_out.stdout) == (0, result.stdout)


def test_compare(checkpoint, data, tmp_path):
    for name in ("a", "b"):
        assert evaluate(checkpoint, "--tasks", "letters", "--data", data, "--output", tmp_path / name).exit_code == 0
    result = evaluate("compare", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "page")
    assert result.exit_code == 0, result.output
    assert "MiniGPT-4, Table 4" in result.stdout and "Paired differences against" in result.stdout
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"answers.html", "minigpt-4-table-4.png"}
    evaluate(checkpoint, "--tasks", "letters", "--data", data, "--output", tmp_path / "c", "--limit", 3)
    line = complaint("compare", tmp_path / "a", tmp_path / "c", "--output", tmp_path / "page")
    assert "with different questions (another revision of the data" in line


def test_list_tasks_names_all():
    result = evaluate("--list-tasks")
    assert result.exit_code == 0, result.output
    for name in ("advanced", "coco_coverage", "stage2_failures", "aokvqa", "gqa", "chair", "scienceqa"):
        assert f"\n{name}: " in f"\n{result.stdout}"
    assert "needs --judge" in result.stdout


def test_help_shows_both():
    result = evaluate("--help")
    assert result.exit_code == 0 and "run" in result.stdout and "compare" in result.stdout


def test_bad_input_is_one_line(checkpoint, data, tmp_path):
    assert "name a CHECKPOINT" in complaint("--tasks", "letters", "--data", data)
    assert "name --tasks" in complaint(checkpoint, "--data", data)
    assert "name the --data" in complaint(checkpoint, "--tasks", "letters")
    assert "no task 'lettres'; the tasks are" in complaint(checkpoint, "--tasks", "lettres")
    assert "no task 'lettres'; the tasks are" in complaint(checkpoint, "--tasks", "lettres", "--data", data)
    assert "either one --data" in complaint(checkpoint, "--tasks", "letters", "--data", data, "--data", tmp_path)
    assert "no data for the task" in complaint(checkpoint, "--tasks", "letters", "--data", tmp_path / "gone")
    assert "no model folder" in complaint("./gone", "--tasks", "letters", "--data", data)
    assert "needs a judge" in complaint(checkpoint, "--tasks", "judged_letters", "--data", data)
    line = complaint(checkpoint, "--tasks", "letters", "--data", data, "--judge-url", "http://127.0.0.1:9/v1")
    assert "--judge-url is given without --judge" in line
    judged = (checkpoint, "--tasks", "letters", "--data", data, "--judge", "j")
    assert "--judge-url is 'here'; give an address" in complaint(*judged, "--judge-url", "here")
    assert "`--judge-timeout` is 0.0; set it" in complaint(*judged, "--judge-timeout", 0)
    assert "set --judge-price-in and --judge-price-out" in complaint(*judged, "--judge-budget-cost", 1)
    (checkpoint / "preprocessor_config.json").unlink(missing_ok=True)
    (checkpoint / "processor_config.json").unlink()
    line = complaint(checkpoint, "--tasks", "letters", "--data", data, "--output", tmp_path / "out")
    assert "processor" in line


def test_the_longest_answer_is_an_option(checkpoint, data, tmp_path):
    words = (checkpoint, "--tasks", "letters", "--data", data, "--output", tmp_path / "out")
    for option, length in (("3", 3), ("letters=5", 5)):
        result = evaluate(*words, "--max-new-tokens", option)
        assert result.exit_code == 0, result.output
        entry = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["letters"]
        assert entry["generation"]["max_new_tokens"] == length
    assert Letters.generation["max_new_tokens"] not in (3, 5)
    assert "names 'gqa', which is not among the tasks letters" in complaint(*words, "--max-new-tokens", "gqa=5")
    assert "is five; give a NUMBER" in complaint(*words, "--max-new-tokens", "five")
    assert "an answer needs at least one" in complaint(*words, "--max-new-tokens", "0")
    line = complaint(*words, "--max-new-tokens", "5", "--max-new-tokens", "letters=5")
    assert "either one --max-new-tokens NUMBER" in line


def test_a_judge_that_dies_costs_nothing_twice(checkpoint, data, tmp_path):
    """Six answers to judge; the endpoint is gone after three. The second run asks the other three alone."""
    words = ["--tasks", "judged_letters", "--data", data, "--judge", "j", "--judge-retries", 0]
    with ScriptedEndpoint([Reply("yes"), Reply("no"), Reply("yes"), Reply(drop=True)]) as endpoint:
        words += ["--judge-url", endpoint.base_url, "--judge-concurrency", 1]
        line = complaint(checkpoint, *words)
        asked = len(endpoint.requests)
        assert asked > 3 and "judg" in line
        assert not (checkpoint / "results.json").exists()
        endpoint.respond = ["yes"]
        result = evaluate(checkpoint, *words)
        assert result.exit_code == 0, result.output
        assert len(endpoint.requests) == asked + 3
        again = evaluate(checkpoint, *words)
        assert again.exit_code == 0 and len(endpoint.requests) == asked + 3
    entry = json.loads((checkpoint / "results.json").read_text())["tasks"]["judged_letters"]
    assert entry["metrics"]["pleasing"] == pytest.approx(100 * 5 / 6)
    assert entry["judge"]["model"] == "j" and entry["judge_prompts"] == JudgedLetters.judge_prompts
    assert (checkpoint / "judge.sqlite").exists()


def test_a_judge_that_writes_prose_is_asked_again_once(checkpoint, data):
    words = ("--tasks", "judged_letters", "--data", data, "--judge", "j", "--limit", 1)
    with ScriptedEndpoint(["Well, that depends on one's taste."]) as endpoint:
        result = evaluate(checkpoint, *words, "--judge-url", endpoint.base_url)
        assert result.exit_code == 0, result.output
        assert len(endpoint.requests) == 2
    entry = json.loads((checkpoint / "results.json").read_text())["tasks"]["judged_letters"]
    assert entry["metrics"] == {} and entry["without_value"] == ["pleasing"]
    assert "no value: judged_letters pleasing" in result.stdout


def test_interrupted(checkpoint, data, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "answer_batches", stop)
    result = evaluate(checkpoint, "--tasks", "letters", "--data", data)
    command = f"minigpt4 evaluate run {checkpoint} --tasks letters --data {data}"
    assert (result.exit_code, result.stderr.endswith(f"`{command}` resumes\n")) == (130, True), result.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [(["my-model"], "my-model"), (["--seed", "1", "--tasks", "gqa"], "--tasks"), (["run", "--limit=3"], "--limit")],
)
def test_demo_takes_no_other_options(words, named):
    result = evaluate("--demo", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"minigpt4: --demo has its own model, tasks and data; leave out {named}\n"


def test_demo_is_short_for_its_command(monkeypatch, tmp_path):
    from transformers_minigpt4.demo import evaluation

    called = []
    monkeypatch.setattr(evaluation, "evaluate_demo", lambda *arguments: called.append(arguments))
    for words in (["--demo", "--seed=3", "--output", tmp_path], ["demo", "--output", tmp_path, "--seed", 3]):
        assert evaluate(*words).exit_code == 0
    assert called == [(tmp_path, 3)] * 2
    assert "Usage: " in evaluate("--demo", "--help").stdout
