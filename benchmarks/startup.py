"""Measures how long the command line takes to answer `--help`, beside TRL's and beside importing torch.

    python benchmarks/startup.py
    python benchmarks/startup.py --repeats 1                                # seconds; only shows that it runs
    python benchmarks/startup.py --before path/to/an/older/checkout         # adds that version's `minigpt4 --help`

Every command runs in a process of its own, in turns. Times are CPU times (user and system) of these processes, which
other programs on the machine hardly change. The files are in the page cache after an unmeasured first run.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path


OURS = "minigpt4 --help"
MINIGPT4 = "from transformers_minigpt4.cli import main; main()"
TRL = "from trl.cli import main; main()"


def commands(before: Path | None) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Arguments of the interpreter, and variables of the environment, by the name of the row."""
    rows = {
        OURS: (["-c", MINIGPT4, "--help"], {}),
        "minigpt4 train --help": (["-c", MINIGPT4, "train", "--help"], {}),
        "minigpt4 describe --help": (["-c", MINIGPT4, "describe", "--help"], {}),
        "trl --help": (["-c", TRL, "--help"], {}),
        "import torch": (["-c", "import torch"], {}),
        "python -c pass": (["-c", "pass"], {}),
    }
    if before is not None:
        rows["minigpt4 --help, before"] = (["-c", MINIGPT4, "--help"], {"PYTHONPATH": str(before / "src")})
    return rows


def cpu_seconds(arguments: list[str], variables: dict[str, str]) -> float:
    """User and system time of one process."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "TERM": "dumb", **variables}
    subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    options = parser.parse_args()

    rows = commands(options.before)
    for row in rows.values():
        cpu_seconds(*row)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(options.repeats):
        for name, row in rows.items():
            times[name].append(cpu_seconds(*row))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print("| command | CPU time (s) | against `minigpt4 --help` |\n| --- | ---: | ---: |")
    for name, median in medians.items():
        print(f"| `{name}` | {median:.2f} | {median / medians[OURS]:.1f} |")


if __name__ == "__main__":
    main()
