"""The training benchmark runs at its smallest size, compares equal losses and counts the work that it states; no
timing is judged."""

import json
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import training
    import training_models

    return training, training_models


@pytest.mark.slow
def test_training_benchmark_measures_every_variant(tmp_path, training, monkeypatch, capsys):
    import torch

    out, threads = tmp_path / "results.json", torch.get_num_threads()
    command = ["training.py", "--size", "tiny", "--stage", "stage 1", "--threads", "1", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(out)])
    try:
        training[0].main()
    finally:
        torch.set_num_threads(threads)
    results = json.loads(out.read_text())["results"]
    assert results.keys() == {"tiny, stage 1"}
    variants = set(training[1].VARIANTS)
    for result in results.values():
        for column in ("seconds_per_sample", "collating_per_sample"):
            assert result[column].keys() == variants
            assert min(min(values) for values in result[column].values()) > 0
        assert result["share"].keys() == result["memory"].keys() == variants
        assert min(result["share"].values()) > 0 and min(result["memory"].values()) > 0
    assert "| + cached features |" in capsys.readouterr().out


def test_benchmark_counts_the_work_of_a_step(training, tmp_path):
    """Against torch's counter, on one row, where nothing is padded; it counts attention among all positions."""
    import torch
    from inference import count_flops

    benchmark, models = training
    options = "cpu", torch.float32, 1
    benchmark.build_cache("tiny", str(tmp_path), options)
    variant = models.Variant(models.CACHED, "tiny", str(tmp_path), "cpu", torch.float32)
    (row, *_), *_ = benchmark.batches("tiny", "stage 2", "cpu")
    batch = variant.collator([row])
    counted = count_flops(lambda: variant.loss(batch).backward())
    width, layers, vocabulary = 64, 2, 32001
    length = batch["input_ids"].shape[1]
    attention = layers * (12 * length**2 - 6 * length * (length + 1)) * width  # what comes after each position
    repeated = 4 * vocabulary * width  # the label's place that closes the list
    assert counted == models.necessary_flops(variant, [row], 0) + attention + repeated


def test_benchmark_refuses_to_compare_different_work(training, tmp_path, monkeypatch):
    import torch

    benchmark, models = training
    options = "cpu", torch.float32, 1
    benchmark.build_cache("tiny", str(tmp_path), options)
    monkeypatch.setattr(models, "LabeledCollator", Wrong)
    names = [name for name in models.VARIANTS if name != models.TRL_LLAVA]
    variants = {name: models.Variant(name, "tiny", str(tmp_path), "cpu", torch.float32) for name in names}
    with pytest.raises(RuntimeError, match="losses differ"):
        benchmark.check_equal_loss(variants, benchmark.batches("tiny", "stage 1", "cpu")[0])


class Wrong:
    """A collator that gets a label wrong."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows):
        batch = self.collator(rows)
        places = (batch["labels"] != -100).nonzero()
        batch["labels"][tuple(places[0])] = 5
        return batch
