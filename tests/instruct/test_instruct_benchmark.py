"""The benchmark of the generator runs at its smallest size; no timing is judged."""

import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_benchmark_measures_every_row(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import instruct

    options = ("--requests", "20", "--alone", "4", "--repeats", "1", "--concurrency", "8", "--coco", "50")
    monkeypatch.setattr(sys, "argv", ["instruct.py", *options])
    instruct.main()
    printed = capsys.readouterr().out
    assert "| 8 | " in printed and "50 images in " in printed and "1,000 answers in under 10 s: " in printed
