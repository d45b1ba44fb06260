"""The paper's variants (a), (b), (c) and the standard model on the toy world, in the manner of its Table 4."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from PIL.Image import Image as PILImage
from rich.console import Console
from rich.table import Table

from transformers_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from transformers_minigpt4.utils.files import write_json

from .run import (
    CHECKPOINTS,
    RECIPES,
    STEPS,
    build_model,
    describe,
    held_out,
    quiet_and_single_threaded,
    save_checkpoint,
    train_stage,
)
from .scoring import is_right_answer, summarize
from .texts import IMAGE_TOKEN, QUESTIONS, STAGE_2_TEMPLATE
from .world import Scene


QUESTION_IMAGES = 60  # each is asked all 8 questions


class ModelOptions(TypedDict, total=False):
    """Keyword arguments of `build_model`."""

    with_qformer: bool
    projector_layers: int


@dataclass(frozen=True)
class Variant:
    """One row of the paper's Table 4."""

    title: str
    trainable_modules: tuple[str, ...] = ("projector",)
    model: ModelOptions = field(default_factory=ModelOptions)


VARIANTS = {
    "standard": Variant("MiniGPT-4"),
    "no_qformer": Variant("(a) without Q-Former", model={"with_qformer": False}),
    "three_layers": Variant("(b) with 3 layers", model={"projector_layers": 3}),
    "tune_qformer": Variant("(c) with tuned Q-Former", trainable_modules=("projector", "qformer")),
}


def train_variants(
    output_dir: str | os.PathLike,
    seed: int = 0,
    steps: int = STEPS,
    variants: Iterable[str] = tuple(VARIANTS),
    console: Console | None = None,
) -> dict[str, dict[str, Path]]:
    """
    Trains variants of the model in both stages, all with the same images, steps and learning rates.

    A variant that an earlier call finished with the same seed and steps is not trained again.

    Args:
        output_dir: Receives one folder per variant, each with `stage1/` and `checkpoint/`.
        seed: Draws the projectors, the images and their order.
        steps: Steps of each stage.
        variants: Names out of `VARIANTS`.
        console: Where progress goes; standard output by default.

    Returns:
        `dict`: for each variant its two checkpoints, `stage1` and `checkpoint` (after stage 2).

    Raises:
        ValueError: for a variant that does not exist, or fewer than one step.
    """
    chosen = list(variants)
    if unknown := [name for name in chosen if name not in VARIANTS]:
        raise ValueError(f"There is no variant {', '.join(unknown)}. Choose from {', '.join(VARIANTS)}.")
    if steps < 1:
        raise ValueError(f"steps={steps}, but each stage needs at least one.")
    console = console or Console()
    made = {}
    with quiet_and_single_threaded():
        for name in chosen:
            folder = Path(output_dir) / name
            made[name] = {checkpoint: folder / checkpoint for checkpoint in CHECKPOINTS}
            finished, settings = folder / "finished.json", {"seed": seed, "steps": steps}
            if finished.is_file() and json.loads(finished.read_text(encoding="utf-8")) == settings:
                console.print(f"{VARIANTS[name].title}: trained already, in {folder}", soft_wrap=True)
                continue
            finished.unlink(missing_ok=True)
            _train(VARIANTS[name], folder, seed, steps, console)
            write_json(finished, settings)
    return made


def _train(variant: Variant, folder: Path, seed: int, steps: int, console: Console) -> None:
    model, processor = build_model(seed, **variant.model)
    for recipe, checkpoint in zip(RECIPES, CHECKPOINTS):
        run = folder / "training" / recipe
        train_stage(
            recipe,
            model,
            processor,
            run,
            steps=steps,
            seed=seed,
            console=console,
            title=f"{variant.title}, {recipe}",
            trainable_modules=variant.trainable_modules,
        )
        save_checkpoint(model, processor, folder / checkpoint, run)


def run_ablations(
    output_dir: str | os.PathLike = "minigpt4-demo",
    seed: int = 0,
    steps: int = STEPS,
    held_out_images: int = 173,
    console: Console | None = None,
) -> dict[str, dict[str, float]]:
    """
    Trains the four variants and prints what each names and answers on combinations that no training stage has shown.

    The Q-Former was made for this toy world, so the figures say nothing about the paper's; they show the same code at
    work.

    Args:
        output_dir: Receives the variants in `ablations/`, and `ablations.json`.
        seed: Draws the projectors, the images and their order.
        steps: Steps of each stage.
        held_out_images: Images to describe, at most 173; the first 60 are also asked 8 questions each.
        console: Where progress and the table go; standard output by default.

    Returns:
        `dict`: for each variant the shares `named after stage1`, `failed after stage1`, `named after checkpoint` and
        `failed after checkpoint` (see `scoring.summarize`), and `answered`: questions answered correctly in the end.

    Raises:
        ValueError: as `train_variants`, and for an impossible number of images.
    """
    console = console or Console()
    output = Path(output_dir)
    scenes, images = held_out(seed, held_out_images)
    folders = train_variants(output / "ablations", seed, steps, console=console)
    rows: dict[str, dict[str, float]] = {}
    with quiet_and_single_threaded():
        for name, checkpoints in folders.items():
            row: dict[str, float] = {}
            for checkpoint in CHECKPOINTS:
                model = MiniGPT4ForConditionalGeneration.from_pretrained(checkpoints[checkpoint])
                processor = MiniGPT4Processor.from_pretrained(checkpoints[checkpoint])
                texts, ended = describe(model, processor, images)
                shares = summarize(texts, scenes, ended)
                row[f"named after {checkpoint}"] = shares["attributes"]
                row[f"failed after {checkpoint}"] = shares["failed"]
            row["answered"] = _answered(model, processor, scenes[:QUESTION_IMAGES], images[:QUESTION_IMAGES])
            rows[name] = row
    results = {"seed": seed, "steps": steps, "held_out_images": len(scenes), "variants": rows}
    write_json(output / "ablations.json", results)
    console.print(_table(rows, len(scenes)))
    return rows


def _answered(
    model: MiniGPT4ForConditionalGeneration,
    processor: MiniGPT4Processor,
    scenes: list[Scene],
    images: list[PILImage],
) -> float:
    """The share of questions answered correctly, every question about every image."""
    right = 0
    for question in QUESTIONS:
        texts, _ = describe(model, processor, images, STAGE_2_TEMPLATE.format(image=IMAGE_TOKEN, text=question))
        right += sum(is_right_answer(question, text, scene) for text, scene in zip(texts, scenes))
    return right / (len(QUESTIONS) * len(scenes))


def _table(rows: dict[str, dict[str, float]], count: int) -> Table:
    table = Table(
        title=f"the paper's variants on the toy world, {count} held-out images",
        caption="Figures of the toy world: they show the code at work and say nothing about the paper's.",
    )
    columns = {
        "questions answered": "answered",
        "named, stage 1": "named after stage1",
        "named, stage 2": "named after checkpoint",
        "failed, stage 1": "failed after stage1",
        "failed, stage 2": "failed after checkpoint",
    }
    table.add_column("")
    for title in columns:
        table.add_column(title, justify="right")
    for name, row in rows.items():
        table.add_row(VARIANTS[name].title, *(f"{100 * row[key]:.1f} %" for key in columns.values()))
    return table
