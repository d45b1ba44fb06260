"""Shows a comparison: a PNG chart for each table, and one HTML page of answers side by side with their images."""

import math
import random
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image
from transformers_minigpt4.utils.files import JsonObject, atomic_file, write_atomically
from transformers_minigpt4.web.html import thumbnail_url

from .compare import Comparison, Run, Table, comparison_tables, read_answers
from .evaluator import Metric
from .results import ANSWERS


if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "answers.html"
_THUMBNAIL = 256  # pixels of the longer side
_CHARTS_A_ROW = 4
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #1a1a1a; }
.wide { overflow-x: auto; } .numbers { width: auto; font-size: 14px; font-variant-numeric: tabular-nums; }
.numbers thead th { border-bottom: 1px solid #888; } .numbers th { width: auto; min-width: 6em; max-width: 22em; }
article { display: flex; gap: 1.2em; border-top: 1px solid #ccc; padding: 1em 0; }
article > div:first-child { flex: 0 0 256px; } article > div + div { flex: 1; min-width: 0; }
article b { white-space: pre-wrap; }
img { max-width: 256px; display: block; margin-bottom: .4em; }
table { border-collapse: collapse; } article table { width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .3em .6em; }
tr + tr td { border-top: 1px solid #e4e4e4; } td.text { white-space: pre-wrap; overflow-wrap: anywhere; }
article th { width: 18%; overflow-wrap: anywhere; } td.small { width: 20%; }
.small { color: #666; font-size: 13px; overflow-wrap: anywhere; } .failed { color: #a00; }
@media (max-width: 46em) { article { display: block; }
  article td, article th { display: block; width: auto !important; } }
"""


def write_charts(comparison: Comparison, folder: Path) -> list[Path]:
    """
    Draw a chart for each table: bars of every run with 95 % intervals, one panel per metric.

    Args:
        comparison: What to draw.
        folder: Created if it does not exist.

    Returns:
        The PNG files.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            'charts need matplotlib; install it with pip install "transformers_minigpt4[evaluation]"'
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for paper, columns in comparison.tables.items():
        across = min(len(columns), _CHARTS_A_ROW)
        down = -(-len(columns) // across)
        figure = Figure(figsize=(1.5 + 2.6 * across, (1.2 + 0.45 * len(comparison.runs)) * down), layout="constrained")
        fields = figure.subplots(down, across, squeeze=False)
        for number, (field, (task, metric)) in enumerate(zip(fields.flat, columns)):
            _draw(field, comparison.runs, task, metric, named=number % across == 0)
        for field in fields.flat[len(columns) :]:
            field.set_axis_off()
        figure.suptitle(_plain(paper))
        path = folder / (re.sub(r"[^a-z0-9]+", "-", paper.lower()).strip("-") + ".png")
        with atomic_file(path) as scratch:
            figure.savefig(scratch, format="png", dpi=150)
        paths.append(path)
    return paths


def _draw(field: "Axes", runs: Sequence[Run], task: str, metric: Metric, named: bool) -> None:
    entries = [run.tasks[task] for run in runs]
    values = [entry["metrics"].get(metric.name, float("nan")) for entry in entries]
    spans = [entry["intervals"].get(metric.name, (value, value)) for entry, value in zip(entries, values)]
    # A percentile interval may exclude the value itself; a bar of negative length cannot be drawn.
    errors = [
        [max(0.0, value - low) for value, (low, _) in zip(values, spans)],
        [max(0.0, high - value) for value, (_, high) in zip(values, spans)],
    ]
    field.barh(range(len(runs)), values, xerr=errors, color="#4a7ab5", ecolor="#333333", capsize=3)
    highest = max((high for _, high in spans if math.isfinite(high)), default=0.0)
    right = 1.05 * highest if highest > 0 else 1.0
    field.set_xlim(-0.02 * right, right)  # so that a 0 is visible, unlike a missing value
    field.set_yticks(range(len(runs)), [_plain(run.name) if named else "" for run in runs])
    field.invert_yaxis()
    better = {True: "higher is better", False: "lower is better", None: "neither is better"}[metric.higher_is_better]
    field.set_title(_plain(f"{task} {metric.name}"), fontsize=9)
    field.set_xlabel(_plain(f"{metric.unit} ({better})"), fontsize=8)
    field.tick_params(labelsize=8)


def _plain(text: str) -> str:
    """Text that matplotlib does not parse as a formula."""
    return text.replace("$", r"\$")


def write_page(comparison: Comparison, folder: Path, *, examples: int = 50, seed: int = 0) -> Path:
    """
    Write `answers.html`, a self-contained file: tables, then questions with images and all answers.

    Args:
        comparison: What to show.
        folder: Created if it does not exist.
        examples: Questions of each task, drawn from those with different answers.
        seed: Draws them.

    Returns:
        The file.
    """
    body = ["<h1>Answers side by side</h1>", *map(_table, comparison_tables(comparison))]
    tasks = dict.fromkeys(task for columns in comparison.tables.values() for task, _ in columns)
    for task in tasks:
        answers = [{row["id"]: row for row in read_answers(run, task)} for run in comparison.runs]
        differ = [id_ for id_ in answers[0] if len({_text(rows[id_]) for rows in answers}) > 1]
        drawn = set(random.Random(seed).sample(differ, min(examples, len(differ))))
        body.append(
            f"<h2>{escape(task)}</h2><p>{len(differ)} of {len(answers[0])} questions have different answers; "
            f"{len(drawn)} of these follow, drawn at random.</p>"
        )
        body += [_example(comparison.runs, [rows[id_] for rows in answers]) for id_ in differ if id_ in drawn]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Answers side by side</title><style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    # A lone surrogate, which a file name may hold, has no UTF-8.
    write_atomically(folder / PAGE, page.encode("utf-8", errors="backslashreplace"))
    return folder / PAGE


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in table.rows
    )
    note = f"<p class='small'>{escape(table.note)}</p>" if table.note else ""
    return (
        f'<h2>{escape(table.title)}</h2><div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _text(row: JsonObject) -> str:
    return str(row.get("answer", row.get("error")))


def _example(runs: Sequence[Run], rows: Sequence[JsonObject]) -> str:
    first = rows[0]
    images = "".join(_image(name, runs[0].folder) for name in first["images"])
    reference = first["reference"] if isinstance(first["reference"], str) else repr(first["reference"])
    lines = [
        f"<tr><th>{escape(run.name)}</th><td class='{'text' if 'answer' in row else 'text failed'}'>"
        f"{escape(_text(row))}</td><td class='small'>{escape(_facts(row['record']))}</td></tr>"
        for run, row in zip(runs, rows)
    ]
    return (
        f"<article><div>{images}<div class='small'>{escape(str(first['id']))}</div></div>"
        f"<div><p><b>{escape(first['prompt'])}</b></p><table>{''.join(lines)}</table>"
        f"<p class='small'>reference: {escape(reference)}</p></div></article>"
    )


def _facts(record: JsonObject) -> str:
    """The numbers of a record, in words."""
    shown = {key: value for key, value in record.items() if isinstance(value, (bool, int, float)) and key != "failed"}
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def _image(name: str, folder: Path) -> str:
    try:
        image = load_image(folder / ANSWERS / name if name.startswith("images/") else name)
    except ImageLoadError as error:
        return f"<p class='small failed'>{escape(str(error))}</p>"
    return f'<img alt="{escape(Path(name).name)}" src="{thumbnail_url(image, _THUMBNAIL)}">'
