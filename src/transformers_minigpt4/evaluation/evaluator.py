"""What all evaluation tasks share: questions, answers, scored records, metrics and their intervals."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from transformers_minigpt4.inference.sources import ImageSource
from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.utils.files import JsonObject


Columns: TypeAlias = Mapping[str, np.ndarray]
Record: TypeAlias = JsonObject

RESAMPLES = 1000  # bootstrap samples of an interval
# Defaults below every task's own arguments of `generate`, so that no checkpoint's sampling or penalties apply.
GREEDY: Mapping[str, object] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
_CHUNK = 4_000_000  # drawn row numbers held at once: 32 MB


@dataclass(frozen=True)
class Question:
    """
    One question to a model.

    Args:
        id: Unique within the task; answers are kept and compared by it.
        prompt: The exact text of the user's turn, without image placeholder and chat template.
        images: In order, each what [`~processing.image_utils_minigpt4.load_image`] takes; none for a text-only
            question.
        reference: What the answer is scored against; must be JSON-serializable.
        groups: What results are split by, such as `{"subject": "natural science"}`.
    """

    id: str
    prompt: str
    images: tuple[ImageSource, ...] = ()
    reference: Any = None
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Statistic:
    """
    A number that depends only on sums over the rows, so that a bootstrap sample costs one product with its counts.

    Args:
        terms: From columns to an array (rows, terms) without NaN.
        formula: From the sums (..., terms) to the number (...); NaN where there is nothing to divide by.
    """

    terms: Callable[[Columns], np.ndarray]
    formula: Callable[[np.ndarray], np.ndarray]

    def __call__(self, columns: Columns) -> float:
        return float(self.formula(self.terms(columns).sum(axis=0)))


@dataclass(frozen=True)
class Metric:
    """
    A named number of a task.

    Args:
        name: Such as `"accuracy"`; letters, digits, `_` and `/`.
        higher_is_better: Its direction; `None` where neither is, such as for the number of words.
        unit: Such as `"%"`, `"words"` or `"points"`.
        compute: From per-question columns to the number. [`mean`], [`ratio`] and [`of_sums`] make fast ones; any other
            function works too and is called once per bootstrap sample.
    """

    name: str
    higher_is_better: bool | None
    unit: str
    compute: Callable[[Columns], float]


def mean(column: str, scale: float = 1.0, where: tuple[str, str] | None = None) -> Statistic:
    """
    Mean of a column over the rows that have a value there.

    Args:
        column: Its name; rows without it or with `None` do not count.
        scale: 100 for a share in %.
        where: `(group, value)`: only rows of this group count.
    """
    return Statistic(partial(_mean_terms, column=column, where=where), partial(_quotient, scale=scale))


def ratio(numerator: str, denominator: str, scale: float = 1.0, where: tuple[str, str] | None = None) -> Statistic:
    """Sum of one column divided by the sum of another, over rows that have both; arguments as of [`mean`]."""
    return Statistic(
        partial(_column_terms, names=(numerator, denominator), where=where), partial(_quotient, scale=scale)
    )


def of_sums(
    formula: Callable[..., np.ndarray], *columns: str, scale: float = 1.0, where: tuple[str, str] | None = None
) -> Statistic:
    """
    Any formula of the sums of columns, such as F1 from counts or BLEU from n-gram counts.

    Args:
        formula: Gets one array of sums per column (each of shape (...,)) and gives an array of that shape; a division
            by zero must give NaN, not raise (numpy's does).
        columns: Names; rows that lack one of them do not count.
        scale: What the result is multiplied by.
        where: `(group, value)`: only rows of this group count.
    """
    return Statistic(partial(_column_terms, names=columns, where=where), partial(_apply, formula=formula, scale=scale))


def _mean_terms(columns: Columns, column: str, where: tuple[str, str] | None) -> np.ndarray:
    terms = _column_terms(columns, (column,), where)
    values = columns.get(column, np.full(len(terms), np.nan))
    counted = ~np.isnan(values) & _rows_of(columns, where, len(terms))
    return np.column_stack([terms[:, 0], counted])


def _column_terms(columns: Columns, names: Sequence[str], where: tuple[str, str] | None) -> np.ndarray:
    rows = len(next(iter(columns.values()), ()))
    missing = np.full(rows, np.nan)
    values = np.column_stack([columns.get(name, missing) for name in names])
    counted = ~np.isnan(values).any(axis=1) & _rows_of(columns, where, rows)
    return np.where(counted[:, None], values, 0.0)


def _rows_of(columns: Columns, where: tuple[str, str] | None, rows: int) -> np.ndarray:
    if where is None:
        return np.ones(rows, bool)
    group, value = where
    return columns[group] == value if group in columns else np.zeros(rows, bool)


def _quotient(sums: np.ndarray, scale: float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] == 0, np.nan, scale * sums[..., 0] / sums[..., 1])


def _apply(sums: np.ndarray, formula: Callable[..., np.ndarray], scale: float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return scale * np.asarray(formula(*np.moveaxis(sums, -1, 0)), float)


class Task(ABC):
    """
    One task of the evaluation.

    A subclass sets the attributes and defines `questions` and `score`; the runner does the rest. It is created without
    arguments and keeps no state between calls.

    Attributes:
        name: As in `--tasks`.
        paper: What it reproduces, such as `"MiniGPT-4, Table 5"`.
        description: One line on what it measures.
        data: One line on the files that it reads, by their official names, for `--list-tasks`.
        dataset: The dataset's usual name, for the model card, such as `"gqa"`.
        split: Its split, such as `"testdev"`.
        prompts: The exact prompts by name, with `{fields}` for the data; questions are made from these.
        judge_prompts: The same for the judge; empty for a task without one.
        generation: Arguments of `generate` on top of [`GREEDY`], such as `{"max_new_tokens": 10}`.
        metrics: Named numbers; `primary` is the name of the most important one.
        needs_judge: Whether `score` cannot do without a judge.
    """

    name: str
    paper: str
    description: str
    data: str
    dataset: str
    split: str = "test"
    prompts: Mapping[str, str]
    judge_prompts: Mapping[str, str] = {}
    generation: Mapping[str, object]
    metrics: tuple[Metric, ...]
    primary: str
    needs_judge: bool = False

    @abstractmethod
    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        """
        Read the official files.

        Images need not be opened; a missing one then counts as a failure of its question.

        Args:
            data: Folder or file of this task.
            limit: Maximum number of questions; the first ones are read.

        Raises:
            ValueError: what is missing or wrong, in one line that says what to do.
            OSError: if a file cannot be read.
        """

    @abstractmethod
    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """
        Score answers, one record per question in the same order.

        Args:
            questions: All of them.
            answers: By id. A question that failed (an image that cannot be loaded) has none: it must count as failed,
                such as `{"correct": 0}`, and never as an empty text.
            judge: A chat model, see [`~transformers_minigpt4.llm.client.ChatModel`].

        Returns:
            JSON objects. Numbers, booleans and `None` (no value) are the columns of the metrics; texts and others are
            kept for reading. The runner adds `id`, `failed` and the question's groups.
        """


def columns_of(records: Sequence[Record], groups: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """
    Records as columns: floats with NaN for absent values, and texts for the groups.

    Args:
        records: One per question.
        groups: Keys of texts to select by; absent ones are `""`.
    """
    columns: dict[str, np.ndarray] = {name: np.array([str(row.get(name, "")) for row in records]) for name in groups}
    numeric = {
        key for row in records for key, value in row.items() if isinstance(value, (bool, int, float)) and key != "id"
    }
    for key in sorted(numeric - columns.keys()):
        values = (row.get(key) for row in records)
        columns[key] = np.array(
            [float(value) if isinstance(value, (bool, int, float)) else math.nan for value in values]
        )
    return columns


def resampled(
    statistics: Sequence[Callable[[Columns], float]],
    columns: Columns,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """
    The statistics of bootstrap samples, each as large as the data, drawn with replacement.

    All statistics see the same samples, and so does a second call with the same seed and number of rows: differences
    between two models over the same questions are then paired.

    Args:
        statistics: What to compute.
        columns: Arrays of the same length.
        resamples: Number of samples.
        seed: Draws them.

    Returns:
        Array (resamples, statistics), NaN where a sample holds nothing to divide by.
    """
    rows = len(next(iter(columns.values()), ()))
    values = np.full((resamples, len(statistics)), np.nan)
    if rows == 0:
        return values
    fast = {i: statistic for i, statistic in enumerate(statistics) if isinstance(statistic, Statistic)}
    terms = {i: statistic.terms(columns) for i, statistic in fast.items()}
    stacked = np.column_stack([np.zeros((rows, 0)), *terms.values()])
    stops = np.cumsum([array.shape[1] for array in terms.values()])
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // rows)
    for start in range(0, resamples, chunk):
        drawn = rng.integers(0, rows, size=(min(chunk, resamples - start), rows))
        here = slice(start, start + len(drawn))
        counts = np.stack([np.bincount(sample, minlength=rows) for sample in drawn]).astype(float)
        for i, sums in zip(fast, np.split(counts @ stacked, stops[:-1], axis=1)):
            values[here, i] = fast[i].formula(sums)
        for i, statistic in enumerate(statistics):
            if i not in fast:
                values[here, i] = [
                    statistic({name: column[sample] for name, column in columns.items()}) for sample in drawn
                ]
    return values


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """The percentile interval of bootstrap samples (resamples,); `None` if none of them is a number."""
    finite = samples[np.isfinite(samples)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def read_json(path: Path, read_object: Callable[[list[tuple[str, Any]]], object] | None = None) -> Any:
    """
    A JSON file of a task's data.

    Args:
        path: The file.
        read_object: Called with the pairs of each object, see `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: if the file does not exist or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=read_object)
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no file {str(path)!r}; docs/reference/tasks.md lists the files of each task"
        ) from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); fetch it again") from error


def read_json_lines(path: Path) -> list[Any]:
    """
    A JSON Lines file of a task's data; empty lines are skipped.

    Raises:
        ValueError: if the file does not exist, or a line is not JSON, with its number.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}; docs/reference/tasks.md lists the files of each task")
    rows = []
    # As bytes, so that a wrong encoding is reported with its line as well.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(
                        f"line {number} of {str(path)!r} is not JSON ({error}); fetch it again"
                    ) from error
    return rows


def find_file(data: Path, *names: str) -> Path:
    """
    `data` itself if it is a file, else the first match of `names` (patterns of `Path.glob`) in the folder `data`.

    Raises:
        ValueError: if there is none.
    """
    if data.is_file():
        return data
    for name in names:
        found = sorted(data.glob(name))
        if found:
            return found[0]
    kind = "holds none of" if data.is_dir() else "does not exist; looked there for"
    raise ValueError(f"{str(data)!r} {kind} {', '.join(names)}; docs/reference/tasks.md lists the files of each task")
