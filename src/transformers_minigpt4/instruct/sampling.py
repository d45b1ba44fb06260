"""Chooses the rows: which image for which kind, always the same for the same source, shares and seed."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers_minigpt4.curation.config import settings_hash
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.data.readers import BadRow

from .config import CONFIG_FILE, InstructConfig
from .prompts import WITH_BOXES, Scene
from .scenes import read_scenes
from .store import InstructProject


_TOGETHER = 5_000  # rows written in one transaction


@dataclass(frozen=True)
class Row:
    """What is asked for: one kind for one image."""

    kind: str
    scene: Scene

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.scene.key}"


@dataclass(frozen=True)
class Sampled:
    """
    What a run added: rows in the project now and how many of them are new.

    `skipped` counts what the source has and cannot be used, by kind; `wanted` is 0 for as many rows as there are.
    """

    total: int
    new: int
    skipped: dict[str, int]
    wanted: int

    def __str__(self) -> str:
        text = f"{self.total:,} rows wanted, {self.new:,} of them new"
        text += left_out(self.skipped)
        if self.total < self.wanted:
            text += f"; the source has no more with these shares, although {self.wanted:,} were asked for"
        return text


def left_out(skipped: Mapping[str, int]) -> str:
    """What of the source cannot be used, in words; each with its kind of `data.readers.BadRow`."""
    if not skipped:
        return ""
    words = {"boxes": "without boxes (conversations only)", "caption": "without captions", "entry": "broken entries"}
    return "; left out in the source: " + ", ".join(f"{n:,} {words.get(kind, kind)}" for kind, n in skipped.items())


def choose_rows(config: InstructConfig) -> tuple[list[Row], list[BadRow]]:
    """
    The rows that a project wants, and what of the source cannot be used.

    A larger limit adds rows to those of a smaller one.

    Raises:
        CurationError: for a source without a usable image, or without boxes if a kind needs them.
        OSError, ValueError: for a source that cannot be read.
    """
    scenes: list[Scene] = []
    bad: list[BadRow] = []
    instances = Path(config.instances) if config.instances is not None else None
    for found in read_scenes(Path(config.captions), instances):
        if isinstance(found, BadRow):
            bad.append(found)
        else:
            scenes.append(found)
    if not scenes:
        example = f", such as {bad[0].key}: {bad[0].reason}" if bad else ""
        raise CurationError(f"{config.captions} has no usable image; {len(bad)} cannot be used{example}")
    needs = [kind for kind in config.shares if kind in WITH_BOXES]
    if needs and not any(scene.boxes for scene in scenes):
        raise CurationError(
            f"{' and '.join(needs)} need boxes, and {config.instances or config.captions} has none; name COCO's "
            "instances_*.json as `instances`, or ask for conversations only with `--kind conversation=1`"
        )
    if needs:
        bad += [BadRow("boxes", scene.key, "there are no boxes") for scene in scenes if not scene.boxes]
    return list(_chosen(scenes, config)), bad


def _chosen(scenes: Sequence[Scene], config: InstructConfig) -> Iterator[Row]:
    """Each row is of the kind that is furthest behind its share, of the next image in that kind's own order."""
    orders: dict[str, Iterator[Scene]] = {}
    for kind in config.shares:
        usable = [scene for scene in scenes if scene.boxes or kind not in WITH_BOXES]
        random.Random(f"{config.seed}/{kind}").shuffle(usable)
        orders[kind] = iter(usable)
    counts = dict.fromkeys(orders, 0)
    number = 0
    while config.limit is None or number < config.limit:
        number += 1
        kind = max(orders, key=lambda kind: config.shares[kind] * number - counts[kind])
        scene = next(orders[kind], None)
        if scene is None:
            return
        counts[kind] += 1
        yield Row(kind, scene)


def sample_rows(project: InstructProject, config: InstructConfig) -> Sampled:
    """
    Adds to the project the rows that it does not have yet. Those that it has keep their captions and boxes.

    Raises:
        CurationError: for a project of another source, seed or other shares; and as [`choose_rows`].
        OSError, ValueError: for a source that cannot be read.
    """
    known = {str(pair.origin["key"]) for pair in project.pairs()}
    identity = json.dumps([config.captions, config.instances, config.seed, config.shares])
    before = project.meta("sampled_from")
    if known and before != identity:
        raise CurationError(
            f"the {len(known):,} rows of {project.folder} were chosen with other captions, instances, seed or kinds "
            f"than {CONFIG_FILE} has now; restore these settings, or start a new project folder"
        )
    skipped = _counts(project)
    if config.limit is not None and len(known) >= config.limit:
        return Sampled(len(known), 0, skipped, config.limit)
    rows, bad = choose_rows(config)
    project.set_meta("sampled_from", identity)
    project.add_skipped(config.captions, *((row.key, row.kind, row.reason) for row in bad))
    new = [row for row in rows if row.key not in known]
    for start in range(0, len(new), _TOGETHER):
        project.add_pairs([row_pair(row) for row in new[start : start + _TOGETHER]], config.captions)
    return Sampled(len(known) + len(new), len(new), _counts(project), config.wanted)


def _counts(project: InstructProject) -> dict[str, int]:
    return project.funnel().skipped


def row_pair(row: Row) -> tuple[str, str, str, dict[str, object]]:
    """A row as [`~store.ProjectStore.add_pairs`] takes it."""
    scene = row.scene
    boxes = [str(box) for box in scene.boxes] if row.kind in WITH_BOXES else []
    shown = {"kind": row.kind, "captions": list(scene.captions), "boxes": boxes}
    digest = settings_hash(row.key, shown)
    return row.key, scene.image, digest, {"key": row.key, "scene": scene.key, **shown}
