"""Runs the demo of LLaVA: data by the stand-in, both training stages, a table before and after, ablations."""

import os
import random
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, TypedDict

from PIL.Image import Image as PILImage
from rich.console import Console
from rich.table import Table

from transformers_minigpt4.instruct.prompts import COMPLEX, CONVERSATION, DETAIL, KINDS
from transformers_minigpt4.modeling.modeling_llava import LlavaLinearForConditionalGeneration
from transformers_minigpt4.processing.processing_llava import LlavaPromptProcessor
from transformers_minigpt4.utils.files import write_json
from transformers_minigpt4.utils.versions import PACKAGE, package_versions

from .llava_data import ALL, LlavaData, ask_about, make_data
from .llava_model import answer_questions, build_llava
from .run import held_out, quiet_and_single_threaded, save_checkpoint, train_stage
from .scoring import is_well_formed, right_attributes
from .world import ATTRIBUTES, Scene


SCENES, HELD_OUT = 800, 60  # images
STAGE_1_STEPS, STAGE_2_STEPS = 200, 600
STATES = ("before training", "after stage 1", "after stage 2")
# The article's recipes with numbers that fit the toy world.
_TOY: dict[str, object] = {
    "use_cpu": True,
    "dtype": "float32",
    "bf16": False,
    "activation_checkpointing": False,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "check_first_loss": False,  # the language model never saw such prompts
}
RECIPES = ("llava_stage1_plain", "llava_stage2")
_SETTINGS: tuple[dict[str, object], ...] = (
    {**_TOY, "per_device_train_batch_size": 16, "learning_rate": 3e-3},
    {**_TOY, "per_device_train_batch_size": 8, "learning_rate": 1.5e-3},
)


class Record(TypedDict):
    """An answer about a held-out image; `named` says of the attributes that it needs whether they are right."""

    shown: dict[str, str]
    kind: str
    question: str
    answer: str
    named: dict[str, bool]
    well_formed: bool


def measure(
    model: LlavaLinearForConditionalGeneration,
    processor: LlavaPromptProcessor,
    scenes: list[Scene],
    images: list[PILImage],
    seed: int,
) -> list[Record]:
    """
    Asks a question of each kind about each image.

    An answer needs the attributes that the stand-in's answer names. One is right if it is named with the image's value
    and no other.
    """
    rng = random.Random(seed + 3)
    asked = [(i, question) for i, scene in enumerate(scenes) for question in ask_about(scene, rng)]
    records: list[Record] = []
    for kind in KINDS:
        of_kind = [(i, question) for i, question in asked if question.kind == kind]
        chosen = [images[i] for i, _ in of_kind]
        texts, ended = answer_questions(model, processor, chosen, [question.text for _, question in of_kind])
        for (i, question), text, end in zip(of_kind, texts, ended):
            needed, right = right_attributes(question.reference, scenes[i]), right_attributes(text, scenes[i])
            records.append(
                {
                    "shown": asdict(scenes[i]),
                    "kind": kind,
                    "question": question.text,
                    "answer": text,
                    "named": {attribute: right[attribute] for attribute in ATTRIBUTES if needed[attribute]},
                    "well_formed": is_well_formed(text, end),
                }
            )
    return records


def summarize(records: list[Record]) -> dict[str, float]:
    """Shares: attributes named correctly, each and all; answers that name all theirs, by kind; `well-formed` ones."""
    shares = {}
    for attribute in ATTRIBUTES:
        shares[attribute] = fmean(record["named"][attribute] for record in records if attribute in record["named"])
    shares["attributes"] = fmean(right for record in records for right in record["named"].values())
    for kind in KINDS:
        shares[kind] = fmean(all(record["named"].values()) for record in records if record["kind"] == kind)
    shares[ALL] = fmean(all(record["named"].values()) for record in records)
    return {**shares, "well-formed": fmean(record["well_formed"] for record in records)}


@dataclass(frozen=True)
class LlavaVariant:
    """One of the article's ablations: what differs from its model."""

    title: str
    stage_1: bool = True
    layer: int = -2
    instructions: str = ALL


STANDARD = LlavaVariant("LLaVA")
ABLATIONS = {
    "no_stage1": LlavaVariant("no stage 1", stage_1=False),
    "last_layer": LlavaVariant("last layer", layer=-1),
    "conversation_only": LlavaVariant("only conversations", instructions=CONVERSATION),
    "detail_only": LlavaVariant("only descriptions", instructions=DETAIL),
    "reasoning_only": LlavaVariant("only reasoning", instructions=COMPLEX),
}


class LlavaResults(TypedDict):
    """What `results.json` holds, apart from the answers: shares (see `summarize`) by state, and by ablation."""

    shares: dict[str, dict[str, float]]
    ablations: dict[str, dict[str, float]]
    held_out_images: int
    rows: dict[str, int]
    seed: int
    recipes: dict[str, int]
    versions: dict[str, str]
    seconds: float


class _Run(NamedTuple):
    """What all variants share."""

    output: Path
    data: LlavaData
    scenes: list[Scene]
    images: list[PILImage]
    seed: int
    steps: tuple[int, int]
    console: Console


def run_llava(
    output_dir: str | os.PathLike[str] = "minigpt4-demo/llava",
    seed: int = 0,
    *,
    ablations: Iterable[str] = (),
    training_images: int = SCENES,
    stage_1_steps: int = STAGE_1_STEPS,
    stage_2_steps: int = STAGE_2_STEPS,
    held_out_images: int = HELD_OUT,
    console: Console | None = None,
) -> LlavaResults:
    """
    Makes instruction data about the toy world, trains a LLaVA on it in two stages, and shows what each one adds.

    The demo's vision tower is frozen. Stage 1 trains the linear layer on captions, stage 2 that layer and the language
    model on the instructions, by the article's recipes with numbers that fit the toy world. The measurements use
    combinations of attributes that neither data nor training have shown.

    Args:
        output_dir: Receives `data/`, `stage1/`, `checkpoint/`, `results.json`, and the run info in `training/`.
        seed: Draws images, data, projector and the order of training.
        ablations: Names out of `ABLATIONS`, which are trained as well.
        training_images: Images that instructions are written about.
        stage_1_steps: Steps of stage 1.
        stage_2_steps: Steps of stage 2.
        held_out_images: Images to ask three questions each, at most 173.
        console: Where progress and tables go; standard output by default.

    Returns:
        `LlavaResults`: a dict.

    Raises:
        ValueError: for an impossible number of images or steps, or an ablation that does not exist.
        FileExistsError: when a folder to replace is not one of an earlier run.
    """
    names = list(ablations)
    scenes, images = held_out(seed, held_out_images)
    output, console = Path(output_dir), console or Console()
    _check(output, names, (training_images, stage_1_steps, stage_2_steps))
    start = time.perf_counter()
    with quiet_and_single_threaded():
        shutil.rmtree(output / "data", ignore_errors=True)
        console.print(f"The stand-in writes instructions about {training_images:,} images.", highlight=False)
        data = make_data(output / "data", training_images, seed)
        run = _Run(output, data, scenes, images, seed, (stage_1_steps, stage_2_steps), console)
        shares, answers = _train(run, STANDARD, output)
        console.print(_table("questions", shares, len(scenes)))
        others: dict[str, dict[str, float]] = {}
        for name in names:
            others[name] = _train(run, ABLATIONS[name], output / "ablations" / name)[0][STATES[-1]]
        if names:
            columns = {STANDARD.title: shares[STATES[-1]], **{ABLATIONS[name].title: others[name] for name in names}}
            console.print(_table("ablations, after stage 2", columns, len(scenes)))
    results: LlavaResults = {
        "shares": shares,
        "ablations": others,
        "held_out_images": len(scenes),
        "rows": data.rows,
        "seed": seed,
        "recipes": dict(zip(RECIPES, run.steps)),
        "versions": package_versions(("torch", "transformers", "trl", PACKAGE)),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_json(output / "results.json", {**results, "answers": answers})
    for what, path in (("checkpoint", output / "checkpoint"), ("data", data.instructions[ALL]), ("answers", output)):
        console.print(f"{what}: {path}", soft_wrap=True)
    console.print(f"{results['seconds']} seconds in total.")
    return results


def _check(output: Path, names: list[str], numbers: tuple[int, int, int]) -> None:
    if unknown := [name for name in names if name not in ABLATIONS]:
        raise ValueError(f"There is no ablation {', '.join(unknown)}. Choose from {', '.join(ABLATIONS)}.")
    if min(numbers) < 1:
        raise ValueError(f"Got {numbers[0]} images, {numbers[1]} and {numbers[2]} steps. Each is at least 1.")
    for name, sign in (("stage1", "config.json"), ("checkpoint", "config.json"), ("data", "scenes")):
        if (output / name).exists() and not (output / name / sign).exists():
            raise FileExistsError(
                f"{output / name} exists but is not of an earlier run, so the demo will not replace it. Choose "
                "another --output."
            )


def _train(
    run: _Run, variant: LlavaVariant, folder: Path
) -> tuple[dict[str, dict[str, float]], dict[str, list[Record]]]:
    """Trains a variant into a folder; its shares and answers by state."""
    model, processor = build_llava(run.seed, variant.layer)
    answers: dict[str, list[Record]] = {}

    def look(state: str) -> None:
        if variant is STANDARD or state == STATES[-1]:
            answers[state] = measure(model, processor, run.scenes, run.images, run.seed)

    def train(stage: int, source: Path, modules: tuple[str, ...], checkpoint: str) -> None:
        recipe = RECIPES[stage]
        train_stage(
            recipe,
            model,
            processor,
            folder / "training" / recipe,
            steps=run.steps[stage],
            seed=run.seed,
            console=run.console,
            title=f"{variant.title}, stage {stage + 1}",
            trainable_modules=modules,
            changes={**_SETTINGS[stage], "sources": f"llava:{source}::images={run.data.images}"},
        )
        save_checkpoint(model, processor, folder / checkpoint, folder / "training" / recipe)
        look(STATES[stage + 1])

    look(STATES[0])
    if variant.stage_1:
        train(0, run.data.captions, ("projector",), "stage1")
    train(1, run.data.instructions[variant.instructions], ("projector", "language_model"), "checkpoint")
    return {state: summarize(records) for state, records in answers.items()}, answers


_SHOWN_AS = {
    "attributes named correctly": {"colour": "color", **{name: name for name in ATTRIBUTES[1:]}, "attributes": "mean"},
    "answers that name all": {CONVERSATION: "conversation", DETAIL: "description", COMPLEX: "reasoning", ALL: "mean"},
    "answers": {"well-formed": "well-formed"},
}


def _table(title: str, columns: dict[str, dict[str, float]], count: int) -> Table:
    table = Table(title=f"{title}, {count} of each kind about held-out images")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for heading, names in _SHOWN_AS.items():
        table.add_section()
        table.add_row(heading, style="bold")
        for key, name in names.items():
            table.add_row(f"  {name}", *(f"{100 * shares[key]:.1f} %" for shares in columns.values()))
    return table
