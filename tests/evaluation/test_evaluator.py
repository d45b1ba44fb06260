"""Checks metrics over columns: means, ratios, formulas, groups, absent values, bootstrap and its interval."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from transformers_minigpt4.evaluation.evaluator import (
    GREEDY,
    Metric,
    columns_of,
    find_file,
    mean,
    of_sums,
    ratio,
    read_json,
    read_json_lines,
)
from transformers_minigpt4.evaluation.intervals import confidence_interval, counted_rows, interval, resampled, wilson
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


def intervals(statistic, unit="%", **columns):
    columns = {name: np.asarray(column) for name, column in columns.items()}
    metric = Metric("it", True, unit, statistic)
    return confidence_interval(metric, columns, resampled([statistic], columns)[:, 0])


def test_wilson_by_hand():
    """Values of the literature: Newcombe (1998), Table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, trials), ends in published.items():
        assert wilson(successes / trials, trials) == pytest.approx(ends, abs=5e-5)
    assert wilson(1.0, 8, scale=100) == (pytest.approx(67.56, abs=0.01), 100.0)
    assert wilson(math.nan, 0) is None


def test_nothing_is_certain_after_eight_questions():
    no, yes, some = np.zeros(8), np.ones(8), np.arange(8) < 2
    accuracy = mean("correct", scale=100)
    assert intervals(accuracy, correct=no) == (0, pytest.approx(32.44, abs=0.01))
    assert intervals(accuracy, correct=yes) == (pytest.approx(67.56, abs=0.01), 100)
    assert intervals(accuracy, correct=some.astype(float)) == pytest.approx((7.15, 59.07), abs=0.01)
    # In a group, of the rows that have a value.
    kind = np.array(["a"] * 4 + ["b"] * 4)
    with_gaps = np.array([1, 1, 1, np.nan, 0, 0, 0, 0])
    in_group = mean("correct", scale=100, where=("kind", "a"))
    assert intervals(in_group, correct=with_gaps, kind=kind) == (pytest.approx(100 * 3 / (3 + 1.959964**2)), 100)
    assert counted_rows(in_group, {"correct": with_gaps, "kind": kind}) == 3
    # Nothing hallucinated: only the images that mention something are trials.
    share = ratio("bad", "mentioned", scale=100, share=True)
    assert intervals(share, bad=no, mentioned=np.array([3, 0, 2, 0, 0, 0, 0, 1])) == (
        0,
        pytest.approx(100 * wilson(0, 3)[1]),
    )
    # In between, the bootstrap: objects of one image are not independent.
    mixed = {"bad": some.astype(float), "mentioned": np.full(8, 4.0)}
    assert intervals(share, **mixed) == interval(resampled([share], mixed)[:, 0])
    # A mean that is no share has no end to stop at.
    assert intervals(mean("words"), "words", words=no) == (0, 0)


def test_nothing_has_no_interval():
    assert intervals(mean("correct", scale=100), correct=np.full(3, np.nan)) is None
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
