"""The evaluation benchmark runs at its smallest size; no timing is judged."""

from pathlib import Path

import pytest


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import evaluation

    return evaluation


def test_batches_and_single_questions_are_timed_on_the_same_answers(benchmark):
    seconds = benchmark.answering(questions=4, sizes=[1, 4], repeats=1)
    assert seconds.keys() == {1, 4} and all(len(times) == 1 and times[0] > 0 for times in seconds.values())


def test_scorers_are_timed_on_rows_that_score(benchmark, tmp_path):
    for number, (measure, rows) in enumerate([(benchmark.gqa_answers, 50), (benchmark.chair_captions, 20)]):
        found = measure(tmp_path / str(number), rows)
        assert found["rows"] == rows and found["score"] > 0 and found["intervals"] > 0
