"""Line charts as what a template draws into an inline SVG: scaled points, and ticks at round numbers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from transformers_minigpt4.utils.files import JsonObject


WIDTH, HEIGHT = 720, 240  # of the area of the lines; the template adds margins for labels
_MOST_POINTS = 1000  # of a line; of more, neighbors are averaged
_MOST_MARKS = 60  # points that are marked one by one
_TICKS = 5


class Series(NamedTuple):
    """A line: its label, and its points `(x, y)` from left to right."""

    label: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> JsonObject | None:
    """
    What a template draws of several lines on one scale; `None` if no line has a finite point.

    Args:
        title: Of the chart.
        x_label, y_label: Of the axes, with units.
        series: Values that are not finite are left out.
    """
    lines = [
        Series(line.label, _averaged([point for point in line.points if all(map(math.isfinite, point))]))
        for line in series
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    y_ticks = round_ticks(min(ys), max(ys))
    left, right = min(xs), max(xs)
    bottom, top = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (y - bottom) / (top - bottom) if top > bottom else 0.5
        return round(WIDTH * across, 1), round(HEIGHT * (1 - up), 1)

    return {
        "title": title,
        "x_label": x_label,
        "y_label": y_label,
        "width": WIDTH,
        "height": HEIGHT,
        "x_ticks": [
            {"at": place(x, bottom)[0], "label": f"{x:g}"} for x in round_ticks(left, right) if left <= x <= right
        ],
        "y_ticks": [{"at": place(left, y)[1], "label": f"{y:g}"} for y in y_ticks],
        "lines": [
            {
                "label": line.label,
                "path": " ".join(f"{x},{y}" for x, y in (place(*point) for point in line.points)),
                "marks": [
                    {"x": place(x, y)[0], "y": place(x, y)[1], "title": f"{line.label}, {x_label} {x:g}: {y:.4g}"}
                    for x, y in line.points[:: math.ceil(len(line.points) / _MOST_MARKS)]
                ],
                "few": len(line.points) <= _MOST_MARKS // 2,
            }
            for line in lines
        ],
    }


def round_ticks(low: float, high: float) -> list[float]:
    """About five round numbers, from the last one that is not above `low` to the first that is not below `high`."""
    if high <= low:
        return [low]
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
