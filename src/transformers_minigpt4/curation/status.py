"""Shows the progress of a project: the funnel of counts and shares, with every reason, as text and as an image."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from transformers_minigpt4.utils.files import atomic_file

from .records import PASSING, Funnel, StepCount
from .settings_file import CurationError
from .store import AnyProject


_BAR = 30  # characters of a full bar
_COLORS = {"passed": "#2a6f97", "lost": "#c1666b", "waiting": "#b8b8b8"}
_REASONS_SHOWN = 20  # of one outcome; the others are added up


@dataclass(frozen=True)
class FunnelRow:
    """
    One line of the funnel.

    Args:
        depth: 0 for a step, 1 for an outcome, 2 for a reason.
        label: In words.
        pairs: How many.
        kind: `"passed"`, `"lost"` or `"waiting"`.
    """

    depth: int
    label: str
    pairs: int
    kind: str


def funnel_rows(project: AnyProject, funnel: Funnel) -> list[FunnelRow]:
    """The funnel from the images sampled to the pairs accepted; a step's first line is what it passes on."""
    rows = [FunnelRow(0, project.sampled, funnel.sampled, "passed")]
    rows += [FunnelRow(1, f"skipped in the source: {kind}", count, "lost") for kind, count in funnel.skipped.items()]
    for step in funnel.steps:
        rows += _step_rows(step, project.step_words[step.step])
    return rows


def passed_on(step: StepCount) -> int:
    """Pairs that a step passes on to the next one."""
    return sum(step.outcomes.get(outcome, 0) for outcome in PASSING[step.step])


def lost_pairs(funnel: Funnel, steps: Mapping[str, str] | None = None) -> dict[str, int]:
    """How many pairs each step did not pass on, by step (or its name in `steps`), outcome and reason."""
    return {
        f"{(steps or {}).get(step.step, step.step)}, {outcome}{', ' if reason else ''}{reason}": count
        for step in funnel.steps
        for outcome, total in step.outcomes.items()
        if outcome not in PASSING[step.step]
        for reason, count in (step.reasons.get(outcome) or {"": total}).items()
    }


def _step_rows(step: StepCount, words: str) -> Iterator[FunnelRow]:
    yield FunnelRow(0, words, passed_on(step), "passed")
    for outcome, count in step.outcomes.items():
        kind = "passed" if outcome in PASSING[step.step] else "lost"
        reasons = sorted(step.reasons.get(outcome, {}).items(), key=lambda item: (-item[1], item[0]))
        if kind == "lost" or reasons or len(PASSING[step.step]) > 1:
            yield FunnelRow(1, outcome, count, kind)
        for reason, number in reasons[:_REASONS_SHOWN]:
            yield FunnelRow(2, _one_line(reason), number, kind)
        if rest := reasons[_REASONS_SHOWN:]:
            yield FunnelRow(2, f"{len(rest)} further reasons", sum(number for _, number in rest), kind)
    if step.waiting:
        yield FunnelRow(1, "waiting", step.waiting, "waiting")


def _one_line(reason: str) -> str:
    """A reason as a label: others' messages may hold line breaks and escape codes."""
    line = "".join(character if character.isprintable() else " " for character in reason)
    return " ".join(line.split())[:60]


def share(count: int, of: int) -> str:
    """A share in percent, or a dash for a share of nothing."""
    return f"{count / of:.1%}" if of else "-"


def status_text(project: AnyProject) -> str:
    """
    The funnel as lines of text: label, pairs, share of the sampled images, and a bar of it for each step.

    Args:
        project: Open.
    """
    funnel = project.funnel()
    rows = funnel_rows(project, funnel)
    labels = ["  " * row.depth + row.label for row in rows]
    width = max(map(len, labels))
    lines = [f"{'':<{width}}  {'pairs':>7}  {'share':>6}"]
    for row, label in zip(rows, labels):
        part = row.pairs / funnel.sampled if funnel.sampled else 0.0
        bar = "#" * round(_BAR * min(part, 1.0)) if row.depth == 0 else ""
        of = "-" if row.label.startswith("skipped") else share(row.pairs, funnel.sampled)
        lines.append(f"{label:<{width}}  {row.pairs:>7}  {of:>6}  {bar}".rstrip())
    if funnel.sampled < funnel.wanted:
        lines.append(f"{funnel.wanted - funnel.sampled} of the {funnel.wanted} pairs wanted have not been sampled")
    return "\n".join(lines)


def save_status_png(project: AnyProject, path: str | os.PathLike[str]) -> None:
    """
    Draws the funnel as a PNG: a bar for each step, and below it thinner ones for what it dropped, by reason.

    Args:
        project: Open.
        path: Replaced atomically if it exists.

    Raises:
        CurationError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CurationError(
            'the chart of the funnel needs matplotlib: pip install "transformers_minigpt4[curation]"'
        ) from error
    funnel = project.funnel()
    rows = [row for row in funnel_rows(project, funnel) if not row.label.startswith("skipped")]
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        height = (0.8, 0.5, 0.3)[row.depth]
        axes.barh(place, row.pairs, height=height, color=_COLORS[row.kind], alpha=1.0 if row.depth == 0 else 0.7)
        text = f" {row.pairs:,} ({share(row.pairs, funnel.sampled)})"
        axes.text(row.pairs, place, text, va="center", fontsize=9, parse_math=False)
    axes.set_yticks(range(len(rows)))
    for label, row in zip(axes.set_yticklabels(["   " * row.depth + row.label for row in rows]), rows):
        label.set(parse_math=False, fontweight="bold" if row.depth == 0 else "normal", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1, funnel.sampled) * 1.18)
    axes.set_xlabel("pairs")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
