"""The benchmarks run at their smallest size and refuse to compare different work; no timing is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_inference_benchmark_measures_every_row_of_every_model(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, BENCHMARKS / "inference.py", "--size", "tiny", "--threads", "1", "--repeats", "1"]
    run = subprocess.run([*command, "--json", out], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    results = json.loads(out.read_text())
    assert "the same 16 greedy tokens" in results["agreement"]
    rows = {f"{kind} {batch}" for kind in ("encode", "first", "decode", "memory") for batch in (1, 8)}
    assert results["rows"].keys() == rows
    models = {"MiniGPT-4", "BLIP-2", "InstructBLIP", "LLaVA"}
    for row in results["rows"].values():
        assert row["median"].keys() == models
        assert min(row["median"].values()) > 0
    assert min(min(by_model.values()) for by_model in results["shares"].values()) > 0
    assert {len(times) for times in results["second_turn"].values()} == {1}
    assert "Second turn, time to first token, batch 1: " in run.stdout
    for line in ("| Image encoding, batch 8 (ms) |", "| Decoding, of the memory bandwidth, batch 1 |"):
        assert line in run.stdout


def test_benchmark_counts_the_work_of_the_formulas(monkeypatch):
    """Operations and bytes of the language model, worked out by hand for the tiny size, 64 positions."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import inference
    import peers
    import torch

    size = peers.SIZES["tiny"]
    model = peers.build_model("MiniGPT-4", size, torch.float32, "cpu")
    inputs = peers.build_inputs(model, 1)
    width, mlp, layers, vocabulary, positions = 64, 176, 2, 32001, 32 + 32
    with torch.inference_mode():
        first = inference.count_flops(lambda: peers.generate(model, inputs, 1))
        encode = inference.count_flops(lambda: peers.encode(model, inputs))
    weights = layers * (4 * width * width + 3 * width * mlp)
    attention = layers * 4 * positions * positions * width
    assert first - encode == 2 * weights * positions + attention + 2 * vocabulary * width

    norms = (2 * layers + 1) * width
    cache = 2 * layers * width * (positions + size.decode_tokens // 2)
    assert inference.decode_bytes(model, 1, size.decode_tokens) == 4 * (weights + vocabulary * width + norms + cache)


def test_benchmark_refuses_to_compare_different_work(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers

    monkeypatch.setattr(peers, "share_weights", lambda ours, peer: None)
    with pytest.raises(RuntimeError, match="different work"):
        peers.check_equal_work(peers.SIZES["tiny"], "cpu")


@pytest.mark.slow
def test_startup_benchmark_measures_every_row():
    command = [sys.executable, BENCHMARKS / "startup.py", "--repeats", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line.split("|")[1].strip() for line in run.stdout.splitlines()[2:]]
    assert rows[0] == "`minigpt4 --help`" and "`trl --help`" in rows and "`import torch`" in rows


@pytest.mark.slow
def test_chat_benchmark_compares_answers_of_several_people(tmp_path):
    out = tmp_path / "results.json"
    options = ["--size", "tiny", "--threads", "1", "--repeats", "1", "--people", "3", "--tokens", "4"]
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "chat.py", *options, "--json", out], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(out.read_text())
    assert results.keys() == {"one after another", "together"}
    for times in results.values():
        assert times.keys() == {"seconds", "cpu", "first"} and all(len(times[name]) == 1 for name in times)
        assert 0 < times["first"][0] < times["seconds"][0]
    assert "| tokens per second, 3 answers of 4 |" in run.stdout
