"""Compares results over the same questions: tables like the papers', paired differences and their significance."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transformers_minigpt4.utils.files import JsonObject
from transformers_minigpt4.utils.json_files import json_lines

from .evaluator import Columns, Metric, Statistic, Task, columns_of
from .intervals import interval, resampled
from .results import ANSWERS, Results, TaskResults, read_results
from .tasks import load_task


_SCIENCEQA = (
    *(f"accuracy/subject/{subject}" for subject in ("natural", "social", "language")),
    *(f"accuracy/context/{context}" for context in ("text", "image", "none")),
    *(f"accuracy/grade/{grades}" for grades in ("1_6", "7_12")),
    *("accuracy", "text_model", "ensemble/complement", "ensemble/judge"),
)
# The columns of the papers' tables; for tasks not listed, all metrics. The others are in the table of all metrics.
COLUMNS = {
    "advanced": tuple(f"successes/{request}" for request in ("meme", "recipe", "advertisement", "poem")),
    "coco_coverage": ("covered", "captions_covered"),
    "stage2_failures": ("failure/detail", "failure/poem"),
    "aokvqa": ("multiple_choice",),
    "gqa": ("accuracy",),
    "chair": ("chair_i/long", "words/long", "chair_i/short", "words/short"),
    **dict.fromkeys(("scienceqa", "scienceqa_short"), _SCIENCEQA),
    "llava_bench": (
        *(f"published/relative_score/{kind}" for kind in ("conv", "detail", "complex")),
        *("published/relative_score", "relative_score"),
    ),
    "pope": tuple(
        f"{name}/{sampling}" for sampling in ("random", "popular", "adversarial") for name in ("accuracy", "f1")
    ),
    "captions": ("bleu_4", "meteor", "cider", "spice"),
}
PERMUTATIONS = 2000
SIGNIFICANT = 0.05
_CHUNK = 4_000_000  # drawn swaps held at once
# What must be equal for numbers to be comparable: key of a task's results, and its name in the error.
_SAME = {
    "fingerprint": "questions (another revision of the data, another --limit, or other images)",
    "prompts": "prompts",
    "judge_prompts": "prompts for the judge",
    "generation": "arguments of generate",
}


@dataclass(frozen=True)
class Run:
    """The results of one checkpoint: its name in tables, its folder, and the entries of `results.json` by task."""

    name: str
    folder: Path
    tasks: Mapping[str, TaskResults]


@dataclass(frozen=True)
class Difference:
    """
    How one metric differs between the first run and another.

    Attributes:
        task, metric, run: Which.
        value: Other minus first.
        interval: 95 %, from bootstrap samples over questions that are the same for both.
        p: Two-sided, of a paired permutation test: how often random swaps of the two answers to a question give at
            least as large a difference.
        significant: Whether `p` is below 0.05 after Holm's correction for all differences of the comparison.
    """

    task: str
    metric: str
    run: str
    value: float
    interval: tuple[float, float] | None
    p: float
    significant: bool = False


@dataclass(frozen=True)
class Comparison:
    """
    Runs over the same questions.

    Attributes:
        runs: All others are compared with the first.
        tables: By paper, the columns of its table as task and metric.
        metrics: All metrics of which a run has a value, as task and metric.
        differences: Of the tables' columns.
    """

    runs: list[Run]
    tables: dict[str, list[tuple[str, Metric]]]
    metrics: list[tuple[str, Metric]]
    differences: list[Difference]


def compare_results(
    folders: Sequence[Path | str], tasks: Sequence[str | Task] | None = None, *, seed: int = 0
) -> Comparison:
    """
    Compare two or more evaluations.

    Args:
        folders: Output folders of `evaluate`; all others are compared with the first.
        tasks: Names or tasks themselves; by default those that every folder has.
        seed: Of bootstrap and permutations.

    Raises:
        ValueError: if a folder holds no results, or the results differ in questions, prompts, judge or arguments of
            `generate`.
    """
    if len(folders) < 2:
        raise ValueError("a comparison needs at least two folders of results")
    runs = _named([Path(folder) for folder in folders])
    chosen = _common_tasks(runs, tasks)
    columns: list[tuple[str, str, Metric]] = []
    everything: list[tuple[str, Metric]] = []
    differences = []
    for task in chosen:
        _check_same(task.name, runs)
        records = [read_answers(run, task.name) for run in runs]
        groups = runs[0].tasks[task.name]["groups"]
        tables = [columns_of([row["record"] for row in rows], groups) for rows in records]
        metrics = [m for m in task.metrics if any(m.name in run.tasks[task.name]["metrics"] for run in runs)]
        everything += [(task.name, metric) for metric in metrics]
        for run, table in zip(runs, tables):
            _check_values(task.name, metrics, run, table)
        paper = str(runs[0].tasks[task.name]["paper"])
        # Answers that nobody has judged yet are compared as well, side by side.
        named = {metric.name: metric for metric in metrics or task.metrics}
        shown = [named[name] for name in COLUMNS.get(task.name, named) if name in named]
        columns += [(paper, task.name, metric) for metric in shown]
        for run, table in zip(runs[1:], tables[1:]):
            differences += _differences(task.name, shown, run.name, tables[0], table, seed)
    columns.sort(key=lambda column: column[0])  # stable: the order of tasks stays within a paper's table
    grouped = {
        paper: [(task, metric) for _, task, metric in rows] for paper, rows in groupby(columns, key=lambda c: c[0])
    }
    return Comparison(runs, grouped, everything, _corrected(differences))


def read_answers(run: Run, task: str) -> list[JsonObject]:
    """
    The answers with their records, in the order of ids.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    path = run.folder / ANSWERS / f"{task}.jsonl"
    if not path.is_file():
        raise ValueError(f"there is no {str(path)!r} next to results.json; evaluate {run.name} again")
    rows: list[JsonObject] = []
    for number, row in json_lines(path):
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {str(path)!r} is not an answer ({row}); evaluate {run.name} again")
        rows.append(row)
    if len(rows) != run.tasks[task]["samples"]:
        raise ValueError(
            f"{str(path)!r} holds {len(rows)} answers, but results.json says {run.tasks[task]['samples']}; "
            f"evaluate {run.name} again"
        )
    return sorted(rows, key=lambda row: str(row["id"]))


def _named(folders: Sequence[Path]) -> list[Run]:
    results = [read_results(folder) for folder in folders]
    places = [folder if folder.is_dir() else folder.parent for folder in folders]
    names = [str(result["checkpoint"]["id"]) for result in results]
    if len(set(names)) < len(names):
        names = _what_differs([place.resolve() for place in places])
    return [Run(name, place, result["tasks"]) for name, place, result in zip(names, places, results)]


def _what_differs(folders: Sequence[Path]) -> list[str]:
    """What paths have between their common beginning and their common end."""
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise ValueError(f"the folder {str(twice)!r} is named twice; compare two different ones")
    parts = [folder.parts for folder in folders]
    same = lambda columns: sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))  # noqa: E731
    start = same(zip(*parts))
    end = same(zip(*(reversed(row[start:]) for row in parts)))
    return ["/".join(row[start : len(row) - end]) or "." for row in parts]


def _common_tasks(runs: Sequence[Run], tasks: Sequence[str | Task] | None) -> list[Task]:
    if tasks is None:
        common = [name for name in runs[0].tasks if all(name in run.tasks for run in runs)]
        if not common:
            held = "; ".join(f"{run.name}: {', '.join(run.tasks) or 'none'}" for run in runs)
            raise ValueError(f"the results have no task in common ({held}); evaluate the same tasks")
        tasks = common
    chosen = [load_task(task) if isinstance(task, str) else task for task in tasks]
    for task in chosen:
        for run in runs:
            if task.name not in run.tasks:
                raise ValueError(
                    f"{run.name} has no results of {task.name!r}, only of {', '.join(run.tasks)}; evaluate it first"
                )
    return chosen


def _check_same(task: str, runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for key, name in _SAME.items():
            if run.tasks[task].get(key) != first.tasks[task].get(key):
                raise ValueError(
                    f"{first.name} and {run.name} were asked {task!r} with different {name}, so their numbers cannot "
                    "be compared; evaluate one of them again with the same"
                )
        judges = [_judge(entry) for entry in (first.tasks[task], run.tasks[task])]
        if judges[0] != judges[1]:
            raise ValueError(
                f"{first.name} and {run.name} were judged on {task!r} by {judges[0]} and {judges[1]}, so their "
                "numbers cannot be compared; evaluate one of them again with the same --judge"
            )


def _judge(entry: TaskResults) -> str:
    judge = entry.get("judge") or {}
    return str(judge.get("model", "people" if judge else "nobody"))


def _check_values(task: str, metrics: Sequence[Metric], run: Run, columns: Columns) -> None:
    for metric in metrics:
        kept, now = run.tasks[task]["metrics"].get(metric.name, math.nan), float(metric.compute(columns))
        if not math.isclose(kept, now, rel_tol=1e-9, abs_tol=1e-9) and not (math.isnan(kept) and math.isnan(now)):
            raise ValueError(
                f"{metric.name} of {task!r} of {run.name} is {kept} in results.json, but {now} by its answers: they "
                "were scored by another version; evaluate again, which reuses the saved answers"
            )


def _differences(
    task: str, metrics: Sequence[Metric], run: str, first: Columns, other: Columns, seed: int
) -> list[Difference]:
    statistics = [metric.compute for metric in metrics]
    samples = resampled(statistics, other, seed=seed) - resampled(statistics, first, seed=seed)
    return [
        Difference(
            task,
            metric.name,
            run,
            float(metric.compute(other)) - float(metric.compute(first)),
            interval(samples[:, i]),
            permutation_p(metric.compute, first, other, seed=seed),
        )
        for i, metric in enumerate(metrics)
    ]


def permutation_p(
    statistic: Callable[[Columns], float],
    first: Columns,
    other: Columns,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> float:
    """
    Two-sided p-value of a paired permutation test.

    If both models were equally good, their answers to a question could be swapped. Each permutation swaps those of a
    random half of the questions; p is the share of differences at least as large as the real one, which itself counts
    as a permutation.

    Args:
        statistic: What is compared.
        first, other: Columns over the same questions in the same order.
        permutations: How many; 2,000 resolve p-values down to 0.0005.
        seed: Draws the swaps.

    Returns:
        NaN if the statistic has no value for one of them.
    """
    real = float(statistic(other)) - float(statistic(first))
    if not math.isfinite(real):
        return math.nan
    rows = len(next(iter(first.values())))
    rng = np.random.default_rng(seed)
    found = []
    chunk = max(1, _CHUNK // rows)
    for start in range(0, permutations, chunk):
        swaps = rng.integers(0, 2, size=(min(chunk, permutations - start), rows), dtype=np.int8).astype(bool)
        found.append(_swapped_differences(statistic, first, other, swaps))
    differences = np.concatenate(found)
    # Sums that differ only in the order of addition must not count as smaller than the real difference.
    as_large = np.abs(differences) >= abs(real) - 1e-9 * max(1.0, abs(real))
    return (1 + int(as_large.sum())) / (1 + permutations)


def _swapped_differences(
    statistic: Callable[[Columns], float], first: Columns, other: Columns, swaps: np.ndarray
) -> np.ndarray:
    if isinstance(statistic, Statistic):
        a, b = statistic.terms(first), statistic.terms(other)
        moved = swaps.astype(float) @ (b - a)
        values: np.ndarray = statistic.formula(b.sum(axis=0) - moved) - statistic.formula(a.sum(axis=0) + moved)
        return values
    differences = []
    for swap in swaps:
        mixed = {name: np.where(swap, other[name], first[name]) for name in first}
        rest = {name: np.where(swap, first[name], other[name]) for name in first}
        differences.append(float(statistic(rest)) - float(statistic(mixed)))
    return np.array(differences)


def _corrected(differences: Sequence[Difference]) -> list[Difference]:
    """Holm's procedure: the smallest of n p-values against 0.05 / n, the next against 0.05 / (n - 1), and so on."""
    tested = sorted((d for d in differences if math.isfinite(d.p)), key=lambda d: d.p)
    passed = set()
    for number, difference in enumerate(tested):
        if difference.p > SIGNIFICANT / (len(tested) - number):
            break
        passed.add(id(difference))
    return [replace(difference, significant=id(difference) in passed) for difference in differences]


class Table(NamedTuple):
    """A table of a comparison, with texts as cells; `note` follows it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Each paper's table with models as rows, the paired differences, and all metrics."""
    runs, first = comparison.runs, comparison.runs[0].name
    tables = []
    for paper, columns in comparison.tables.items():
        header = ["", *(_title(task, metric) for task, metric in columns)]
        rows = [[run.name, *(_cell(run.tasks[task], metric.name) for task, metric in columns)] for run in runs]
        tables.append(Table(paper, header, rows))
    header = [f"against {first}", "metric", "difference", "95 % interval (bootstrap)", "p (permutation)"]
    tested = sum(math.isfinite(difference.p) for difference in comparison.differences)
    tables.append(
        Table(
            f"Paired differences against {first}",
            header,
            [_difference_row(difference) for difference in comparison.differences],
            f"* p below {SIGNIFICANT} after Holm's correction for all {tested} of them",
        )
    )
    if len(comparison.metrics) > sum(map(len, comparison.tables.values())):
        rows = [
            [_title(task, metric), *(_cell(run.tasks[task], metric.name) for run in runs)]
            for task, metric in comparison.metrics
        ]
        tables.append(Table("All metrics", ["", *(run.name for run in runs)], rows))
    return tables


def markdown(tables: Sequence[Table]) -> str:
    """The tables as Markdown."""
    sections = [
        [table.title, markdown_table(table.header, table.rows), *([table.note] if table.note else [])]
        for table in tables
    ]
    return "\n\n".join(part for section in sections for part in section)


def _difference_row(difference: Difference) -> list[str]:
    known = math.isfinite(difference.p)
    return [
        difference.run,
        f"{difference.task} {difference.metric}",
        f"{difference.value:+.4g}" if known else "no value",
        f"{difference.interval[0]:+.4g} to {difference.interval[1]:+.4g}" if difference.interval else "",
        f"{difference.p:.4f}" + "*" * difference.significant if known else "",
    ]


def _title(task: str, metric: Metric) -> str:
    return f"{task} {metric.name} {_arrow(metric)} ({metric.unit})"


def _arrow(metric: Metric) -> str:
    return {True: "↑", False: "↓", None: "·"}[metric.higher_is_better]


def _cell(entry: TaskResults, metric: str) -> str:
    if metric not in entry["metrics"]:
        return "no value"
    span = entry["intervals"].get(metric)
    return f"{entry['metrics'][metric]:.4g}" + (f" [{span[0]:.4g}, {span[1]:.4g}]" if span else "")


def results_table(results: Results, tasks: Sequence[str]) -> str:
    """The metrics of some tasks of a `results.json` as Markdown, followed by those without a value."""
    rows, without = [], []
    for name in tasks:
        entry = results["tasks"][name]
        for metric in entry["metrics"]:
            counts = [str(entry.get("questions", {}).get(metric, entry["samples"])), str(entry["failures"])]
            rows.append([name, metric, _cell(entry, metric), entry["units"][metric], *counts])
        # Of a metric and its groups, the metric says it all.
        lacking = [m for m in entry["without_value"] if not any(m.startswith(f"{n}/") for n in entry["without_value"])]
        if lacking:
            without.append(f"no value: {name} {', '.join(lacking)}")
        without += [f"note: {note}" for note in entry.get("notes", [])]
    table = markdown_table(["task", "metric", "value [95 % interval]", "unit", "questions", "failed"], rows)
    return "\n".join([table, *without])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells padded to columns; `|` within a cell is escaped."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in lines)) for i in range(len(header))]
    padded = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in lines]
    return "\n".join([padded[0], "| " + " | ".join("-" * width for width in widths) + " |", *padded[1:]])
