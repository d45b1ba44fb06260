"""Curation projects that are ready for review, without a model."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from transformers_minigpt4.curation.config import CurationConfig
from transformers_minigpt4.curation.records import IMAGES, Result, text_hash
from transformers_minigpt4.curation.store import Project
from transformers_minigpt4.llm.types import ChatSettings


def make_project(folder: Path, texts: Sequence[tuple[str, str]], *, twice: float = 0.0, keys=None) -> Project:
    """A project in which the model wrote the first and the repair made the second text of each pair; all kept."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CurationConfig(source="imagefolder:x", checkpoint="x", repair=ChatSettings("x"), review_twice=twice)
    project = Project.create(folder, config)
    keys = keys or [f"{number:05d}" for number in range(len(texts))]
    with open(folder / IMAGES / "first.png", "wb") as file:
        Image.new("RGB", (64, 48), (200, 40, 40)).save(file, "PNG")
    for key in keys:
        (folder / IMAGES / f"{key}.png").hardlink_to(folder / IMAGES / "first.png")
    project.add_pairs([(key, f"{IMAGES}/{key}.png", f"digest {key}", {"key": key}) for key in keys], "somewhere")
    project.record("generate", [Result(w.pair.id, "", w.input, "ok", text=t[0]) for w, t in _work(project, texts, 0)])
    set_texts(project, {work.pair.id: t[1] for work, t in _work(project, texts, 1)})
    return project


def _work(project: Project, texts, step: int):
    return list(zip(project.pending(("generate", "repair")[step], ""), texts, strict=True))


def set_texts(project: Project, texts: dict[int, str], flag: str = "") -> None:
    """Gives pairs a new text of the repair, and lets the filter keep them."""
    inputs = {pair.id: text_hash(text) for pair, text in project.texts("repair")}
    project.record(
        "repair",
        [Result(i, "", inputs[i], "flagged" if flag else "ok", flag, text) for i, text in texts.items()],
    )
    project.record("filter", [Result(i, "", text_hash(text), "kept") for i, text in texts.items()])


def drop(project: Project, pair_id: int) -> None:
    """Lets the filter drop a pair."""
    text = {pair.id: text for pair, text in project.texts("filter")}[pair_id]
    project.record("filter", [Result(pair_id, "", text_hash(text), "dropped", "some rule")])
