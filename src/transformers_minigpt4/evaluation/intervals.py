"""How certain a metric is: bootstrap samples over questions, their intervals, and Wilson's for proportions."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from .evaluator import Columns, Metric, Statistic


RESAMPLES = 1000  # bootstrap samples of an interval
_CHUNK = 4_000_000  # drawn row numbers held at once: 32 MB


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


def confidence_interval(
    metric: Metric, columns: Columns, samples: np.ndarray, level: float = 0.95
) -> tuple[float, float] | None:
    """
    The interval of a metric: Wilson's for a proportion, else the percentile interval of the bootstrap.

    A proportion is the mean in % of a column of zeros and ones. At 0 of 8 every bootstrap sample is 0 of 8 as well,
    and its interval would claim certainty. Other shares, such as CHAIR_i, therefore get Wilson's interval at either
    end too, with one trial for each row that has something to count: what one row holds is not independent.

    Args:
        metric: What `samples` are of.
        columns: Arrays of the same length.
        samples: From [`resampled`], of shape (resamples,).
        level: Its confidence.

    Returns:
        `(low, high)`, or `None` if there is nothing to divide by.
    """
    statistic = metric.compute
    if not isinstance(statistic, Statistic) or statistic.highest is None:
        return interval(samples, level)
    if statistic.is_mean and metric.unit != "%":
        return interval(samples, level)
    terms = statistic.terms(columns)
    sums = terms.sum(axis=0)
    highest, value = statistic.highest(sums), float(statistic.formula(sums))
    is_proportion = statistic.is_mean and bool(np.isin(terms[:, 0], (0.0, 1.0)).all())
    if not is_proportion and value not in (0.0, highest):
        return interval(samples, level)
    return wilson(value / highest, int((terms != 0).any(axis=1).sum()), level, scale=highest)


def wilson(share: float, trials: int, level: float = 0.95, *, scale: float = 1.0) -> tuple[float, float] | None:
    """
    Wilson's score interval of a proportion (Wilson, 1927).

    Args:
        share: Successes divided by `trials`, 0 to 1.
        trials: Number of independent trials.
        level: Its confidence.
        scale: What both ends are multiplied by.

    Returns:
        `(low, high)`, or `None` without trials.
    """
    if not trials or not math.isfinite(share):
        return None
    z = NormalDist().inv_cdf((1 + level) / 2)
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    # At either end the formula gives exactly 0 or 1, but for rounding.
    low = 0.0 if share == 0 else max(0.0, center - half)
    high = 1.0 if share == 1 else min(1.0, center + half)
    return scale * low, scale * high


def counted_rows(statistic: Callable[[Columns], float], columns: Columns) -> int:
    """How many rows a metric is made of; all of them for a function that does not say."""
    if isinstance(statistic, Statistic):
        return int(statistic.counted(columns).sum())
    return len(next(iter(columns.values()), ()))
