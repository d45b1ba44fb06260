"""Writes `report.html`: one page without links to elsewhere, with funnel, lengths, rules, samples kept and dropped."""

import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image
from transformers_minigpt4.utils.files import JsonObject, write_atomically
from transformers_minigpt4.web.html import is_hidden, thumbnail_url

from .config import CurationConfig
from .filter import project_rules
from .records import PASSING, Pair, Result, now
from .rules import RULES
from .status import funnel_rows, share
from .store import AnyProject, Project


REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
_SAMPLES = 6  # of each reason
_THUMBNAIL = 240  # pixels of the longer side; shown at 160
_LONGEST_TEXT = 4_000  # characters shown of one text
_WIDTH, _HEIGHT, _BUCKETS = 720, 140, 30  # of a histogram
_EXPLAINED = {"dropped": "dropped by", "kept": "kept by"}  # other outcomes: `rejected in`
_KEPT = (("review", "accepted"), ("review", "edited"), ("filter", "kept"))  # shown as kept, the last step first


def run_report(project: Project, config: CurationConfig, path: str | os.PathLike[str] | None = None) -> Path:
    """
    Writes the report of a curation in its current state, see [`write_report`].

    Args:
        project: Open.
        config: Its settings.
        path: By default `report.html` in the project's folder.

    Returns:
        `Path`: of the report.
    """
    described = project_rules(config).describe()
    repaired = f", repaired by {config.repair.model}" if config.repair is not None else ""
    made = f"Source {config.source}, described by {config.checkpoint}{repaired}."
    return write_report(project, "Curation report", made, {rule.name: described[rule.name] for rule in RULES}, path)


def write_report(
    project: AnyProject,
    title: str,
    made: str,
    rules: Mapping[str, str],
    path: str | os.PathLike[str] | None = None,
) -> Path:
    """
    Writes the report of a project in its current state.

    Texts are escaped, and control characters shown by their code points, so that nothing that a model wrote acts in
    the reader's browser. Images are embedded as small copies; if one is missing the page says so.

    Args:
        project: Open.
        title: Of the page.
        made: How the texts were made, in a sentence.
        rules: What each reason to drop a text means.
        path: By default `report.html` in the project's folder. Replaced atomically if it exists.

    Returns:
        `Path`: of the report.
    """
    path = Path(path) if path is not None else project.folder / REPORT_FILE
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, finalize=_shown
    )
    page = environment.get_template("report.html.jinja").render(_facts(project, title, made, rules))
    write_atomically(path, page)
    return path


def visible(text: str) -> str:
    """A text with control, direction and other invisible characters as `⟨U+202E⟩`; line breaks and tabs are kept."""
    if text.isprintable():
        return text
    return "".join(f"⟨U+{ord(character):04X}⟩" if is_hidden(character) else character for character in text)


def _shown(value: object) -> object:
    return visible(value) if type(value) is str else value


def _facts(project: AnyProject, title: str, made: str, rules: Mapping[str, str]) -> JsonObject:
    """Everything that the template shows."""
    funnel = project.funnel()
    rows = [
        {
            **asdict(row),
            "share": share(row.pairs, funnel.sampled),
            "percent": f"{100 * min(1.0, row.pairs / funnel.sampled):.2f}" if funnel.sampled else "0",
        }
        for row in funnel_rows(project, funnel)
    ]
    dropped, also = Counter[str](), Counter[str]()
    for _, result in project.current("filter"):
        if result.outcome == "dropped":
            dropped[result.reason] += 1
            also.update(list(result.details.get("also", {})))
    return {
        "title": title,
        "name": project.folder.resolve().name,
        "made": now()[:16].replace("T", " ") + " UTC",
        "how": made,
        "funnel": rows,
        "charts": list(_charts(project)),
        "rules": [
            {"name": name, "what": what, "count": dropped[name], "also": also[name]} for name, what in rules.items()
        ],
        "kept": list(_kept(project)),
        "groups": list(_groups(project)),
    }


# Lengths


def word_count(text: str) -> int:
    """Words separated by white space."""
    return len(text.split())


def _charts(project: AnyProject) -> Iterator[JsonObject]:
    if "repair" in project.steps:
        after = {pair.id: result.text for pair, result in project.current("repair") if result.outcome != "failed"}
        texts = {pair.id: text for pair, text in project.texts("repair") if pair.id in after}
        before = [word_count(text) for text in texts.values()]
        repaired = [word_count(text if after[pair] is None else after[pair] or "") for pair, text in texts.items()]
        if before:
            yield histogram("Repair", [("before", "before", before), ("after", "after", repaired)])
    kept = {pair.id for pair, result in project.current("filter") if result.outcome == "kept"}
    lengths = {pair.id: word_count(text) for pair, text in project.texts("filter")}
    if lengths:
        left = [length for pair, length in lengths.items() if pair in kept]
        yield histogram("Filter", [("before", "before", list(lengths.values())), ("after", "kept", left)])


def histogram(title: str, series: Sequence[tuple[str, str, Sequence[int]]]) -> JsonObject:
    """
    What the template draws of several series of integers on one scale.

    Args:
        title: Of the chart.
        series: `(class, label, values)`; the first is not empty.
    """
    most = max(max(values, default=0) for _, _, values in series)
    step = max(1, -(-(most + 1) // _BUCKETS))
    buckets = most // step + 1
    counts = [Counter(value // step for value in values) for _, _, values in series]
    highest = max(max(count.values(), default=0) for count in counts)
    slot = _WIDTH / buckets
    width = round(slot * 0.9 / len(series), 2)
    bars = []
    for number, (name, label, _) in enumerate(series):
        for bucket, count in sorted(counts[number].items()):
            height = round(_HEIGHT * count / highest, 2)
            words = f"{bucket * step}" if step == 1 else f"{bucket * step} to {(bucket + 1) * step - 1}"
            bars.append(
                {
                    "series": name,
                    "x": round(bucket * slot + number * width, 2),
                    "y": round(_HEIGHT - height, 2),
                    "width": width,
                    "height": height,
                    "title": f"{label}: {count} of {words} words",
                }
            )
    every = max(1, buckets // 10)
    ticks = [{"x": round(bucket * slot, 2), "label": bucket * step} for bucket in range(0, buckets, every)]
    keys = [{"name": name, "label": label, "summary": _summary(values)} for name, label, values in series]
    return {"title": title, "width": _WIDTH, "height": _HEIGHT, "bars": bars, "ticks": ticks, "series": keys}


def _summary(values: Sequence[int]) -> str:
    if not values:
        return "none"
    ordered = sorted(values)
    return f"{len(ordered)} texts, median {ordered[len(ordered) // 2]} words, {ordered[0]} to {ordered[-1]}"


# Samples


def _kept(project: AnyProject) -> Iterator[JsonObject]:
    """Samples of what people accepted and edited and what the filter kept, with the texts as the model wrote them."""
    described = {pair.id: result.text or "" for pair, result in project.current("generate")}
    for step, outcome in _KEPT:
        found = [(pair, result) for pair, result in project.current(step) if result.outcome == outcome]
        if found:
            texts = {pair.id: text for pair, text in project.texts(step)}
            yield _group(project, step, outcome, "", found, texts, described)


def _groups(project: AnyProject) -> Iterator[JsonObject]:
    """Samples of every reason for which a step failed, dropped, rejected or flagged pairs."""
    for step in project.steps:
        texts = {pair.id: text for pair, text in project.texts(step)}
        reasons: dict[tuple[str, str], list[tuple[Pair, Result]]] = {}
        for pair, result in project.current(step):
            if result.outcome not in PASSING[step] or result.outcome == "flagged":
                reasons.setdefault((result.outcome, result.reason), []).append((pair, result))
        for (outcome, reason), found in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
            yield _group(project, step, outcome, reason, found, texts, {})


def _group(
    project: AnyProject,
    step: str,
    outcome: str,
    reason: str,
    found: Sequence[tuple[Pair, Result]],
    texts: Mapping[int, str],
    described: Mapping[int, str],
) -> JsonObject:
    chosen = random.Random(0).sample(found, min(_SAMPLES, len(found)))
    samples = [
        _sample(project, pair, result, texts[pair.id], described.get(pair.id, texts[pair.id]))
        for pair, result in sorted(chosen, key=lambda item: item[0].id)
    ]
    title = f"{_EXPLAINED.get(outcome, f'{outcome} in')} {step}{': ' if reason else ''}{reason}"
    return {"title": title, "count": len(found), "samples": samples}


def _sample(project: AnyProject, pair: Pair, result: Result, text: str, described: str) -> JsonObject:
    """One pair of a group: its texts with labels, why it is here, and its image."""
    after = result.text if result.text is not None else text
    steps = [("as described", described)] * (described != text) + [("before", text)] * (after != text)
    texts = [(label, one) for label, one in steps if one] + [("after" if steps else "", after)] * bool(after)
    sample = {"key": pair.key, "texts": list(_shortened(texts)), "why": _why(result)}
    try:
        return {**sample, "image": thumbnail_url(load_image(project.image_path(pair)), _THUMBNAIL), "no_image": ""}
    except ImageLoadError as error:
        return {**sample, "image": None, "no_image": f"no image: {error.reason}"}


def _why(result: Result) -> str:
    """What a step recorded of its verdict, in words."""
    details = {name: value for name, value in result.details.items() if name != "also"}
    why = str(details.pop("why", ""))
    if "of" in details:
        why += f"; like {details.pop('of')}"
    decisions = details.pop("decisions", ())
    said = "; ".join(f"{name}: {', '.join(words)}" for name, *words in decisions)
    more = ", ".join(f"{name}: {value}" for name, value in details.items()) if result.outcome != "dropped" else ""
    return "; ".join(filter(None, (why, said, more)))


def _shortened(texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for label, text in texts:
        rest = len(text) - _LONGEST_TEXT
        yield label, text if rest <= 0 else f"{text[:_LONGEST_TEXT]} … ({rest} further characters)"
