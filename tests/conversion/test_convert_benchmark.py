"""The benchmark of the conversion runs at its smallest size; no timing is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "convert.py"


@pytest.mark.slow
def test_benchmark(tmp_path):
    command = [sys.executable, BENCHMARK, "--size", "tiny", "--folder", tmp_path, "--json", tmp_path / "figures.json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {
        *("read_gb", "written_gb", "copy_seconds", "slower_copy_seconds"),
        *("convert_seconds", "speed_of_copying", "peak_gb"),
    }
    assert min(figures.values()) > 0
    assert "| peak resident |" in run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
