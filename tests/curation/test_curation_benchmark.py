"""The curation benchmark runs at its smallest size and compares equal work; no timing is judged."""

import json
import sys
from pathlib import Path

import torch


def test_the_benchmark_measures_every_row(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import curation

    out, threads = tmp_path / "results.json", torch.get_num_threads()
    sizes = {"images": 2, "batch": 2, "repeats": 1, "pairs": 60, "review-pairs": 10, "presses": 1, "threads": 1}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["curation.py", "--size", "tiny", "--json", str(out), *options])
    try:
        curation.main()
    finally:
        torch.set_num_threads(threads)
    results = json.loads(out.read_text())
    timed = [*results["generation"].values(), *results["second turn"].values(), *results["review"].values()]
    assert len(timed) == 13 and all(min(seconds) > 0 for seconds in timed)
    assert 40 < results["filter"]["all pairs, kept"] < 60
    assert "| share of it |" in capsys.readouterr().out
