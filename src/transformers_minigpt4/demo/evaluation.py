"""Evaluates the demo's models on its drawn images with the actual tasks, in tables like the paper's."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypedDict

from rich.console import Console
from rich.table import Table

from transformers_minigpt4.evaluation.run import evaluate
from transformers_minigpt4.utils.files import write_json

from .ablations import VARIANTS, train_variants
from .evaluation_data import IMAGES, write_data
from .evaluation_tasks import TruthJudge, demo_tasks
from .run import CHECKPOINTS, held_out, quiet_and_single_threaded


LABEL = "the demo's figures, not the paper's"
STATES = dict(zip(CHECKPOINTS, ("before stage 2", "after stage 2")))
BATCH = 64


Rows: TypeAlias = dict[str, dict[str, dict[str, dict[str, float]]]]  # variant, state, task, metric


class DemoEvaluation(TypedDict):
    """What `demo.json` holds; `models` has the metrics of each task by variant and state."""

    label: str
    seed: int
    images: int
    models: Rows


def evaluate_demo(
    output: str | os.PathLike,
    seed: int = 0,
    *,
    images: int = IMAGES,
    checkpoints: Mapping[str, Mapping[str, Path]] | None = None,
    console: Console | None = None,
) -> DemoEvaluation:
    """
    Evaluate the standard model and the paper's variants on the toy world, before and after stage 2.

    The tasks of the paper's Tables 2 to 5 run as on real data: the scenes are written in the official file formats,
    the models are loaded from their folders, and a judge that knows the toy world replaces the language model. A
    second call neither trains nor asks again.

    Args:
        output: Receives `checkpoints/`, `data/`, a folder of results for each model in `results/VARIANT/STATE`, and
            `demo.json`.
        seed: Draws the images and the training.
        images: Images to ask about, at most 173; the first 40 with the questions of Table 4.
        checkpoints: Trained ones by variant (of `demo.ablations.VARIANTS`) and state (`stage1`, `checkpoint`); by
            default all four variants are trained, which takes minutes.
        console: Where progress and tables go; standard output by default.

    Returns:
        What `demo.json` holds.

    Raises:
        ValueError: for an impossible number of images, or an `output` with results of other checkpoints.
    """
    if not 1 <= images <= IMAGES:
        raise ValueError(f"images is {images}, but {IMAGES} combinations are held out; choose 1 to {IMAGES}")
    output, console = Path(output), console or Console()
    trained = checkpoints if checkpoints is not None else train_variants(output / "checkpoints", seed, console=console)
    write_data(output / "data", *held_out(seed, images), seed)
    rows: Rows = {}
    with quiet_and_single_threaded(), TruthJudge() as judge:
        for variant, folders in trained.items():
            for state, folder in folders.items():
                console.print(f"asking {VARIANTS[variant].title}, {STATES[state]}")
                results = evaluate(
                    str(folder),
                    demo_tasks(),
                    output / "data",
                    output / "results" / variant / state,
                    judge=judge,
                    batch_size=BATCH,
                    device="cpu",
                    seed=seed,
                )
                metrics = {task: entry["metrics"] for task, entry in results["tasks"].items()}
                rows.setdefault(variant, {})[state] = metrics
    summary: DemoEvaluation = {"label": LABEL, "seed": seed, "images": images, "models": rows}
    write_json(output / "demo.json", summary)
    for table in demo_tables(rows, images):
        console.print(table)
    console.print(f"answers, records and intervals of each model in {output / 'results'}", soft_wrap=True)
    return summary


def demo_tables(rows: Rows, images: int) -> list[Table]:
    """
    The demo's figures in tables like the paper's Tables 2 to 5.

    Args:
        rows: The metrics of each task by variant and state.
        images: Number of images asked about.
    """
    models = [
        ((VARIANTS[variant].title, STATES[state].removesuffix(" stage 2")), metrics)
        for variant, states in rows.items()
        for state, metrics in states.items()
    ]
    coverage = _table(2, f"captions covered, {images} images", ("images covered", "captions of 5"))
    for title, metrics in models:
        found = metrics["coco_coverage"]
        coverage.add_row(*title, _percent(found, "covered"), _number(found, "captions_covered", 2))
    failures = _table(3, "failed descriptions", ("failed", "repetition", "fragment", "off-topic"))
    for title, metrics in models:
        found = metrics["stage2_failures"]
        kinds = ("failure", "repetition", "fragment", "off_topic")
        failures.add_row(*title, *(_percent(found, f"{kind}/detail") for kind in kinds))
    questions = _table(4, "questions answered", ("A-OKVQA", "GQA"))
    for title, metrics in models:
        chosen = _percent(metrics["aokvqa"], "multiple_choice")
        questions.add_row(*title, chosen, _percent(metrics["gqa"], "accuracy"))
    objects = _table(5, "hallucinated objects", ("CHAIR_i long", "words", "CHAIR_i short", "words"))
    for title, metrics in models:
        found = metrics["chair"]
        cells = [
            cell
            for length in ("long", "short")
            for cell in (_percent(found, f"chair_i/{length}"), _number(found, f"words/{length}", 1))
        ]
        objects.add_row(*title, *cells)
    return [coverage, failures, questions, objects]


def _table(number: int, title: str, columns: Sequence[str]) -> Table:
    table = Table(title=f"in the manner of Table {number}: {title}", caption=LABEL)
    table.add_column("model")
    table.add_column("stage 2")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _percent(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.1f} %" if name in metrics else "none"


def _number(metrics: Mapping[str, float], name: str, digits: int) -> str:
    return f"{metrics[name]:.{digits}f}" if name in metrics else "none"
