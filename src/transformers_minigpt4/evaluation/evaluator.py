"""What all evaluation tasks share: questions, answers, scored records and metrics."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from transformers_minigpt4.inference.sources import ImageSource
from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.utils.files import JsonObject
from transformers_minigpt4.utils.json_files import json_lines, open_regular, parse_json


Columns: TypeAlias = Mapping[str, np.ndarray]
Record: TypeAlias = JsonObject

# Defaults below every task's own arguments of `generate`, so that no checkpoint's sampling or penalties apply.
GREEDY: Mapping[str, object] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}


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
        counted: From columns to an array (rows,) of booleans: the rows that have what the number is made of.
        terms: From columns to an array (rows, terms), zeros in rows that do not count.
        formula: From the sums (..., terms) to the number (...); NaN where there is nothing to divide by.
        highest: Of a share: from the sums to its largest value, such as 100 where its unit is %; `None` for a number
            that is not a share.
        is_mean: Whether it is the mean of a column; it is a share if the metric's unit is %.
    """

    counted: Callable[[Columns], np.ndarray]
    terms: Callable[[Columns], np.ndarray]
    formula: Callable[[np.ndarray], np.ndarray]
    highest: Callable[[np.ndarray], float] | None = None
    is_mean: bool = False

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
        compute: From per-question columns to the number. [`mean`], [`ratio`] and [`of_sums`] make fast ones; any
            other function works too and is called once per bootstrap sample.
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
    return replace(ratio(column, _ROW, scale, where, share=True), is_mean=True)


def ratio(
    numerator: str,
    denominator: str,
    scale: float = 1.0,
    where: tuple[str, str] | None = None,
    *,
    share: bool = False,
) -> Statistic:
    """
    Sum of one column divided by the sum of another, over rows that have both.

    Args:
        numerator, denominator: Names of columns.
        scale, where: As of [`mean`].
        share: Whether it lies between 0 and `scale`, which its interval at either end depends on.
    """
    return of_sums(_quotient, numerator, denominator, scale=scale, where=where, share=share)


def of_sums(
    formula: Callable[..., np.ndarray],
    *columns: str,
    scale: float = 1.0,
    where: tuple[str, str] | None = None,
    share: bool | Callable[..., float] = False,
) -> Statistic:
    """
    Any formula of the sums of columns, such as F1 from counts or BLEU from n-gram counts.

    Args:
        formula: Gets one array of sums per column (each of shape (...,)) and gives an array of that shape; a division
            by zero must give NaN, not raise (numpy's does).
        columns: Names; rows that lack one of them do not count.
        scale: What the result is multiplied by.
        where: `(group, value)`: only rows of this group count.
        share: Whether it lies between 0 and `scale`; or a formula of the same sums for the largest value.
    """
    highest = None
    if share:
        highest = partial(_highest, share=share if callable(share) else None, scale=scale)
    return Statistic(
        partial(_counted, names=columns, where=where),
        partial(_terms, names=columns, where=where),
        partial(_apply, formula=formula, scale=scale),
        highest,
    )


_ROW = ""  # in place of a column: 1 in every row


def _column(columns: Columns, name: str) -> np.ndarray:
    rows = len(next(iter(columns.values()), ()))
    return np.ones(rows) if name == _ROW else columns.get(name, np.full(rows, np.nan))


def _counted(columns: Columns, names: Sequence[str], where: tuple[str, str] | None) -> np.ndarray:
    counted = ~np.isnan(np.column_stack([_column(columns, name) for name in names])).any(axis=1)
    if where is None:
        return counted
    group, value = where
    return counted & (columns[group] == value if group in columns else False)


def _terms(columns: Columns, names: Sequence[str], where: tuple[str, str] | None) -> np.ndarray:
    values = np.column_stack([_column(columns, name) for name in names])
    return np.where(_counted(columns, names, where)[:, None], values, 0.0)


def _quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator == 0, np.nan, numerator / denominator)


def _apply(sums: np.ndarray, formula: Callable[..., np.ndarray], scale: float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return scale * np.asarray(formula(*np.moveaxis(sums, -1, 0)), float)


def _highest(sums: np.ndarray, share: Callable[..., float] | None, scale: float) -> float:
    return scale if share is None else scale * float(share(*sums))


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
        judge_temperature: At which the judge answers; `None` for that of its settings.
        notes: What a reader of results with a judge must know, one sentence each.
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
    judge_temperature: float | None = None
    notes: tuple[str, ...] = ()
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


def read_json(path: Path, read_object: Callable[[list[tuple[str, Any]]], object] | None = None) -> Any:
    """
    A JSON file of a task's data.

    Args:
        path: The file.
        read_object: Called with the pairs of each object, see `object_pairs_hook` of `json.loads`.

    Raises:
        OSError: if the file cannot be read, or is not a regular file.
        ValueError: if the file does not exist or is not JSON.
    """
    try:
        with open_regular(path) as file:
            return parse_json(file.read(), read_object)
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
    for number, row in json_lines(path):
        if isinstance(row, ValueError):  # a benchmark without some of its rows is another one
            raise ValueError(f"line {number} of {str(path)!r} is not JSON ({row}); fetch it again") from row
        rows.append(row)
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
