"""Compares describing shards in one process with Ray's workers: start-up, and the time of the work itself.

    python benchmarks/shards.py --model my-checkpoint

Each run is a separate process that fills a new folder with captions of the same images; the ways take turns, and each
repeat starts with a different one. docs/benchmarks.md explains the columns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image

from transformers_minigpt4.bulk import ranks, ray_run
from transformers_minigpt4.bulk.shard_run import DescribeJob, EngineSettings, ShardRun
from transformers_minigpt4.bulk.shards import Shard, ShardResult
from transformers_minigpt4.bulk.sinks import JsonLinesSink


PROMPT = "Describe this image in detail."
WAYS = {"one process": 0, "Ray, 1 worker": 1, "Ray, 2 workers": 2}  # and their numbers of Ray's workers


@dataclass(frozen=True)
class TimedJob:
    """A job that notes when each shard began and ended; the clock is the machine's, so that processes can compare."""

    job: DescribeJob
    notes: str

    def start(self) -> Callable[[Shard], ShardResult]:
        """See `ShardJob`."""
        finish = self.job.start()

        def timed(shard: Shard) -> ShardResult:
            begin = time.time()
            result = finish(shard)
            with open(self.notes, "a") as file:
                file.write(json.dumps([begin, time.time()]) + "\n")
            return result

        return timed


def main() -> None:
    """Runs all ways in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint")
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--shard-size", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), arguments.images)
        found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
        for repeat in range(arguments.repeats):
            ways = [*WAYS][repeat % len(WAYS) :] + [*WAYS][: repeat % len(WAYS)]
            for way in ways:
                found[way].append(measure(way, folder, arguments))
                print(f"{way}: start {found[way][-1][0]:.1f} s, work {found[way][-1][1]:.1f} s", file=sys.stderr)
    print(table(found, arguments))


def draw(folder: Path, count: int) -> None:
    """Photographs' size, a shape on a colour each."""
    (folder / "images").mkdir()
    for number in range(count):
        image = Image.new("RGB", (500, 375), (number * 7 % 256, number * 13 % 256, number * 29 % 256))
        image.paste((250, number % 250, 20), (number % 300, number % 200, number % 300 + 120, number % 200 + 120))
        image.save(folder / "images" / f"{number:06d}.jpg")


def measure(way: str, folder: str, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds from the start of the process to the first shard, from there to the last one's end, and to its end."""
    notes = Path(folder, "notes")
    notes.unlink(missing_ok=True)
    begin = time.time()
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way, "--folder", folder], check=True)
    end = time.time()
    times = [json.loads(line) for line in notes.read_text().splitlines()]
    first, last = min(time for time, _ in times), max(time for _, time in times)
    return first - begin, last - first, end - last


def run(arguments: argparse.Namespace) -> None:
    """One run, in its own process."""
    from shards import TimedJob  # Ray's workers know nothing of this program's `__main__`

    files = sorted(map(str, Path(arguments.folder, "images").iterdir()))
    with tempfile.TemporaryDirectory() as output:
        run = ShardRun(
            Path(output, "captions"),
            JsonLinesSink(PROMPT, arguments.model),
            files,
            [],
            EngineSettings("transformers", arguments.model, arguments.batch_size),
            PROMPT,
            arguments.shard_size,
            {"do_sample": False, "max_new_tokens": arguments.max_new_tokens},
        )
        job = TimedJob(run.job, str(Path(arguments.folder, "notes")))
        if workers := WAYS[arguments.way]:
            results = list(ray_run.finish_shards(run.left, job, workers))
        else:
            results = list(ranks.finish_shards(run.left, job, run.folder, ranks.Rank(0, 1)))
        if sum(result.described for result in results) != len(files):
            raise SystemExit(f"not every image has a caption: {results}")


def table(found: dict[str, list[tuple[float, float, float]]], arguments: argparse.Namespace) -> str:
    """The medians over the repeats."""
    lines = [
        f"{arguments.images:,} images in shards of {arguments.shard_size}, batches of {arguments.batch_size}, at most "
        f"{arguments.max_new_tokens} new tokens, {os.cpu_count()} cores, {arguments.repeats} repeats.",
        "",
        "| | start-up (s) | work (s) | images per minute | work, against one process | end (s) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, times in found.items():
        start, work, end = (median(column) for column in zip(*times))
        paired = median(one[1] / other[1] for one, other in zip(times, found["one process"]))
        rate = 60 * arguments.images / work
        lines.append(f"| {way} | {start:.1f} | {work:.1f} | {rate:,.0f} | {paired:.2f} | {end:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
