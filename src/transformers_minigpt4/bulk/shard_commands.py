"""The part of `describe` that writes a folder of shards, with one process or many."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeAlias

import typer

from transformers_minigpt4.utils.command_line import complain, interruptible


if TYPE_CHECKING:
    from collections.abc import Iterable

    from tqdm import tqdm

    from .ranks import Rank
    from .shard_run import ShardRun
    from .shards import ShardResult
    from .sinks import Sink


RayWorkers: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--ray-workers",
        metavar="NUMBER",
        help="Models that Ray runs at the same time, on this machine or on the cluster at RAY_ADDRESS; auto for one "
        "per GPU. For an --output folder.",
    ),
]
ShardSize: TypeAlias = Annotated[
    int,
    typer.Option(
        "--shard-size",
        min=1,
        metavar="NUMBER",
        help="Images per file of an --output folder. Tar files and datasets keep the shards that they have.",
    ),
]


KINDS = ("jsonl", "parquet", "wds")
_PLACE = re.compile(rf"({'|'.join(KINDS)}):(.+)", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """
    Where a folder of shards goes, and which processes fill it.

    Attributes:
        kind: one of `KINDS`.
        folder: its path.
        workers: of Ray; 0 for none of them, and `None` for one per GPU.
        rank: which process of several this is.
    """

    kind: str
    folder: str
    workers: int | None
    rank: "Rank"

    def sink(self, prompt: str, model: str) -> "Sink":
        """The format of the files."""
        from .parquet_sink import ParquetSink
        from .sinks import JsonLinesSink
        from .webdataset_sink import WebdatasetSink

        sinks: dict[str, Callable[[str, str], Sink]] = dict(zip(KINDS, (JsonLinesSink, ParquetSink, WebdatasetSink)))
        return sinks[self.kind](prompt, model)


def open_place(output: str | None, workers: str | None, images: list[str], device: str | None) -> Place | None:
    """
    The folder of shards that `--output` names, or `None` where it names a file or nothing.

    Raises:
        ValueError: for options that do not go together, or many processes without a folder.
    """
    from .ranks import Rank, this_rank

    count = _parse_workers(workers)
    rank = this_rank(on_cpu=device is not None)
    if rank is not None and workers is not None:
        raise ValueError("torchrun and --ray-workers both start processes; leave one of them out")
    if rank is not None and "-" in images:
        raise ValueError(
            "processes of torchrun cannot share standard input; write the list to a file with the heading image, and "
            "name it as table:FILE.csv"
        )
    match = _PLACE.fullmatch(output or "")
    if match is not None:
        return Place(match[1], match[2], count, rank or Rank(0, 1))
    if workers is None and rank is None:
        return None
    raise ValueError(
        "several processes write a folder; name one and its format, such as --output jsonl:captions"
        + ("" if output is None else f", instead of {output!r}")
    )


def _parse_workers(text: str | None) -> int | None:
    if text == "auto":
        return None
    if text is not None and (not text.isdecimal() or int(text) < 1):
        raise ValueError(f"--ray-workers is {text!r}; give a number from 1, or auto for one per GPU")
    return int(text or 0)


def finish(run: "ShardRun", place: Place, how: str) -> bool:
    """
    Completes a folder of captions, with a bar and messages on stderr.

    Args:
        run (`ShardRun`): what is to be done.
        place (`Place`): which processes work.
        how (`str`): what a later run is started with, for messages.

    Returns:
        `bool`: whether every image that was left has been described.
    """
    report = _Report(run, place.rank)
    if not run.left:
        typer.echo(f"{report.who}all {run.folder.count} shards are in {run.folder.path} already", err=True)
        return True
    results = run.results(place.rank) if place.workers == 0 else run.results_of_ray(place.workers)
    with interruptible(lambda: report.stopped(how)), contextlib.closing(results):
        if place.workers == 0:
            return report.follow(results)
        # Ray prints what happens to workers on stdout.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return report.follow(results)


class _Report:
    """What a run says on stderr."""

    def __init__(self, run: "ShardRun", rank: "Rank") -> None:
        self.run = run
        self.who = f"process {rank.number + 1} of {rank.total}: " if rank.total > 1 else ""
        self.no_bar = True if rank.number else None  # None: no bar where stderr is a file
        self.described = self.failed = 0
        self.bar: tqdm[NoReturn] | None = None

    def follow(self, results: "Iterable[ShardResult]") -> bool:
        """Counts results as they come; returns whether nothing failed."""
        from tqdm.auto import tqdm

        folder = self.run.folder
        lost = 0
        with tqdm(
            total=folder.count,
            initial=len(folder.finished()),
            unit="shard",
            file=sys.stderr,
            disable=self.no_bar,
        ) as self.bar:
            for result in results:
                if result.fatal:
                    raise ValueError(result.error)
                self.described += result.described
                self.failed += result.failed
                if result.error is not None:
                    lost += 1
                    name = self.run.shards[result.number].name
                    # Errors of reading name their shard.
                    error = result.error if result.error.startswith(name) else f"{name}: {result.error}"
                    with _above(self.bar):
                        complain(f"{self.who}{error}")
                self.bar.set_postfix(images=self.described, failed=self.failed)
                self.bar.n = len(folder.finished())
                self.bar.refresh()
        parts = [f"{self.who}{self.described} described in {folder.path}, {self.failed} failed"]
        if self.failed:
            parts.append("see .captions-*.errors there")
        if lost:
            parts.append("1 shard is not finished" if lost == 1 else f"{lost} shards are not finished")
        typer.echo("; ".join(parts), err=True)
        return not self.failed and not lost

    def stopped(self, how: str) -> str:
        """What to say at Ctrl-C."""
        if self.bar is not None:
            self.bar.close()
        folder = self.run.folder
        return (
            f"{self.who}stopped after {len(folder.finished())} of {folder.count} shards, now in {folder.path}; {how}"
        )


@contextlib.contextmanager
def _above(bar: "tqdm[NoReturn]") -> Iterator[None]:
    """A place for lines above a bar."""
    bar.clear()
    try:
        yield
    finally:
        bar.refresh()
