"""
Time and memory of `minigpt4 data filter-cc3m` on synthetic captions, without the extractor of noun phrases.

    python benchmarks/caption_filter.py --captions 300000

Writes captions with three phrases each, whose frequencies fall like those of words (Zipf), and their phrases; then
filters them in another process, whose peak memory is read. The extractor is not part of it: it is spaCy's, or yours.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


EXPONENT = 1.25  # of Zipf's law
UNIQUE = 3_000_000  # phrases that can be drawn
PHRASES = 3
RUN = """
import resource, sys, time
from pathlib import Path
from transformers_minigpt4.data.caption_filter import filter_captions

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
done = filter_captions(*(Path(word) for word in sys.argv[1:]))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(seconds, before, peak, *done)
"""


def write_captions(folder: Path, count: int) -> None:
    """`captions.tsv` and `phrases.jsonl`."""
    rng = np.random.default_rng(0)
    with (folder / "captions.tsv").open("w") as captions, (folder / "phrases.jsonl").open("w") as phrases:
        for start in range(0, count, 100_000):
            size = min(100_000, count - start)
            for number, row in enumerate((rng.zipf(EXPONENT, size=(size, PHRASES)) % UNIQUE).tolist(), start=start):
                words = [f"the phrase {word}" for word in row]
                caption = f"{' next to '.join(words)} in a picture"
                captions.write(f"{caption}\thttp://example.org/images/{number}.jpg\n")
                phrases.write(json.dumps({"caption": caption, "phrases": words}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=300_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        write_captions(folder, arguments.captions)
        size = sum(os.path.getsize(folder / file) for file in ("captions.tsv", "phrases.jsonl"))
        print(
            f"{arguments.captions:,} captions, {size / 2**20:.0f} MiB, written in {time.perf_counter() - start:.0f} s"
        )
        print(f"Python {platform.python_version()}, NumPy {np.__version__}")
        for _ in range(arguments.repeats):
            words = [str(folder / file) for file in ("captions.tsv", "pool.tsv", "phrases.jsonl")]
            done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=True)
            seconds, before, peak, captions, kept, phrases, frequent = map(float, done.stdout.split())
            print(
                f"{seconds:.1f} s, {(peak - before) / 1024:.0f} MiB above the {before / 1024:.0f} MiB of the imports; "
                f"{kept:,.0f} of {captions:,.0f} captions kept, {phrases:,.0f} phrases, {frequent:,.0f} of them not "
                "dropped",
                flush=True,
            )


if __name__ == "__main__":
    main()
