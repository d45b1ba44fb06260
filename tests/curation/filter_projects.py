"""Curation projects with given texts and images, without a model."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from transformers_minigpt4.curation.config import CurationConfig
from transformers_minigpt4.curation.records import IMAGES, Result, text_hash
from transformers_minigpt4.curation.store import Project


# Ten texts with nothing in common, that every rule keeps.
TEXTS = tuple(
    f"The picture shows a {a} beside a {b}. Behind them stands {c}, and on top of it lies a {d}."
    for a, b, c, d in (
        ("grey horse", "wooden gate", "a long row of poplars", "broken kite"),
        ("young fisherman", "rusty bicycle", "an empty harbour office", "coil of rope"),
        ("bowl of cherries", "silver spoon", "somebody's violin case", "folded newspaper"),
        ("tall lighthouse", "stranded ferry", "the cliff of an island", "flock of gulls"),
        ("marble statue", "market stall", "an old cathedral", "copper dome"),
        ("red tractor", "barn with holes", "a field full of maize", "scarecrow"),
        ("sleeping baby", "stuffed rabbit", "the door of a nursery", "paper moon"),
        ("steam engine", "water tank", "a station in the desert", "layer of dust"),
        ("robot with three arms", "chess board", "its proud inventor", "tangle of cables"),
        ("wedding cake", "nervous waiter", "the band on its stage", "pair of drumsticks"),
    )
)


def photograph(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """An image with large soft patches of color, another one for each seed."""
    fields = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(fields).resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def make_project(
    folder: Path, texts: Sequence[str], images: Sequence[bytes] | None = None, **settings: Any
) -> Project:
    """A project whose model wrote `texts` about `images`, which are all different by default."""
    config = CurationConfig(**{"source": "imagefolder:/home/somebody/shots", "checkpoint": "some/model", **settings})
    folder.mkdir(parents=True, exist_ok=True)
    project = Project.create(folder, config)
    add(project, texts, images)
    return project


def add(project: Project, texts: Sequence[str], images: Sequence[bytes] | None = None) -> None:
    first = sum(1 for _ in project.pairs())
    images = images or [jpeg(photograph(first + number)) for number in range(len(texts))]
    rows = []
    for number, content in enumerate(images, start=first):
        name = f"{IMAGES}/{number:05d}.jpg"
        (project.folder / name).write_bytes(content)
        rows.append((f"{number:05d}", name, hashlib.sha256(content).hexdigest(), {"key": f"row {number}"}))
    project.add_pairs(rows, "somewhere")
    work = list(project.pending("generate", "s"))
    project.record(
        "generate", [Result(w.pair.id, "s", w.input, "ok", text=t) for w, t in zip(work, texts, strict=True)]
    )


def review(project: Project, **actions: str) -> None:
    """Records reviewers' verdicts: `p00001="rejected"`, or a new text for an edited pair."""
    results = []
    for pair, text in project.texts("review"):
        action = actions.get(f"p{pair.key}", "accepted")
        if action in ("accepted", "rejected"):
            results.append(Result(pair.id, "", text_hash(text), action))
        elif action != "waiting":
            results.append(Result(pair.id, "", text_hash(text), "edited", text=action))
    project.record("review", results)
