"""Checks metrics over columns: means, ratios, formulas, groups, absent values, bootstrap and its interval."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from transformers_minigpt4.evaluation.evaluator import (
    GREEDY,
    columns_of,
    find_file,
    interval,
    mean,
    of_sums,
    ratio,
    read_json,
    read_json_lines,
    resampled,
)
from transformers_minigpt4.evaluation.tasks import TASKS, load_task


RECORDS = [
    {"correct": True, "objects": 1, "mentioned": 4, "text": "a", "kind": "open"},
    {"correct": False, "objects": 0, "mentioned": 6, "kind": "closed"},
    {"correct": None, "objects": 2, "mentioned": None, "kind": "closed"},
    {"correct": True, "objects": 0, "mentioned": 10, "kind": "closed"},
]


@pytest.fixture
def columns():
    return columns_of(RECORDS, ["kind"])


def test_columns_hold_numbers_and_groups(columns):
    assert columns.keys() == {"correct", "objects", "mentioned", "kind"}
    np.testing.assert_array_equal(columns["correct"], [1, 0, np.nan, 1])
    assert columns["kind"].tolist() == ["open", "closed", "closed", "closed"]


@pytest.mark.parametrize(
    "statistic,value",
    [
        (mean("correct", scale=100), 200 / 3),
        (mean("correct", where=("kind", "closed")), 1 / 2),
        (mean("correct", where=("kind", "absent")), np.nan),
        (mean("correct", where=("absent", "closed")), np.nan),
        (mean("absent"), np.nan),
        (ratio("objects", "mentioned", scale=100), 100 * 1 / 20),
        (ratio("objects", "mentioned", where=("kind", "closed")), 0),
        (of_sums(lambda a, b: 2 * a / (a + b), "objects", "mentioned"), 2 / 21),
        (of_sums(lambda a: a / (a - 3), "objects"), np.nan),  # the sum is 3, and 3 / 0 is no number
    ],
)
def test_statistics(columns, statistic, value):
    found = statistic(columns)
    assert found == pytest.approx(value, nan_ok=True) or (np.isnan(value) and np.isinf(found))


def test_bootstrap_of_sums_is_the_bootstrap_of_rows(columns):
    """The fast way gives to the digit what drawing rows and computing anew gives."""
    rng = np.random.default_rng(3)
    columns = {"correct": rng.random(50), "objects": rng.integers(0, 5, 50).astype(float)}
    fast = resampled([mean("correct"), ratio("objects", "correct")], columns, resamples=20)
    slow = resampled(
        [lambda c: c["correct"].mean(), lambda c: c["objects"].sum() / c["correct"].sum()], columns, resamples=20
    )
    np.testing.assert_allclose(fast, slow, rtol=1e-12)
    assert len(set(fast[:, 0])) == 20


def test_samples_are_paired_and_seeded(columns):
    other = {name: column[::-1] for name, column in columns.items()}
    one, two = (resampled([mean("correct")], c, resamples=50, seed=1) for c in (columns, columns))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, resampled([mean("correct")], columns, resamples=50, seed=2), equal_nan=True)
    assert resampled([mean("correct")], other, resamples=50, seed=1).shape == (50, 1)


def test_interval_covers_as_often_as_it_says():
    """Of 200 samples of a coin with p = 0.3, about 95 % of the intervals hold 0.3 (binomial: 180 to 198)."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        columns = {"correct": (rng.random(200) < 0.3).astype(float)}
        low, high = interval(resampled([mean("correct")], columns, resamples=400, seed=seed)[:, 0])
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 198


def test_nothing_has_no_interval():
    assert interval(np.array([np.nan, np.nan])) is None
    assert np.isnan(resampled([mean("correct")], {}, resamples=3)).all()


def test_files_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "broken.json").write_text('{"a": ')
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n\n{"b": \n')
    with pytest.raises(ValueError, match=r"no file .*gone.json"):
        read_json(tmp_path / "gone.json")
    with pytest.raises(ValueError, match=r"broken.json' is not JSON"):
        read_json(tmp_path / "broken.json")
    with pytest.raises(ValueError, match=r"line 3 of .*lines.jsonl"):
        read_json_lines(tmp_path / "lines.jsonl")
    with pytest.raises(ValueError, match=r"holds none of a.json, c\*.json"):
        find_file(tmp_path, "a.json", "c*.json")
    with pytest.raises(ValueError, match=r"does not exist"):
        find_file(tmp_path / "gone", "a.json")
    assert find_file(tmp_path, "a.json", "l*.jsonl").name == "lines.jsonl"
    assert find_file(tmp_path / "broken.json", "a.json").name == "broken.json"


def test_unknown_task_names_the_known():
    with pytest.raises(ValueError, match=r"no task 'gqua'; the tasks are advanced, .*gqa"):
        load_task("gqua")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_the_contract(name):
    task = load_task(name)
    assert task.name == name and task.paper and task.description and task.data and task.dataset and task.prompts
    names = [metric.name for metric in task.metrics]
    assert task.primary in names and len(names) == len(set(names))
    generation = {**GREEDY, **task.generation}
    assert generation["do_sample"] is False and generation["num_beams"] == 1 and generation["max_new_tokens"] > 0
    assert not task.needs_judge or task.judge_prompts


def test_the_task_of_the_documentation_works(tmp_path):
    """The example of docs/guides/evaluate.md, on two questions of which one failed."""
    page = (Path(__file__).parents[2] / "docs" / "guides" / "evaluate.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from transformers_minigpt4.evaluation.evaluator import.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)
    rows = [{"id": key, "things": "dogs", "image": f"{key}.jpg", "n": 2} for key in "abc"]
    (tmp_path / "counting.json").write_text(json.dumps(rows))
    task = names["Counting"]()
    questions = task.questions(tmp_path)
    assert questions[0].prompt == "How many dogs are there? Answer with a number."
    records = task.score(questions, {"a": "2", "b": "3"})
    assert task.metrics[0].compute(columns_of(records)) == pytest.approx(100 / 3)
