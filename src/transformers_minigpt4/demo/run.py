"""Runs the demo: both stages of training on the small world, a table after each, a checkpoint and a contact sheet."""

import contextlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, Value
from PIL.Image import Image as Picture
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Blip2QFormerModel,
    Blip2VisionModel,
    BlipImageProcessorPil,
    LlamaForCausalLM,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from transformers_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from transformers_minigpt4.training.sft import load_rows, make_trainer, parse_recipe

from .contact_sheet import save_contact_sheet
from .scoring import FAILURES, failure, right_attributes, summarise
from .texts import DETAIL_PROMPTS, IMAGE_TOKEN, INSTRUCTIONS, STAGE_2_TEMPLATE, detailed_description, web_caption
from .world import ATTRIBUTES, IMAGE_SIZE, Scene, draw, held_out_scenes, training_scenes


CHECKPOINTS = ("stage1", "checkpoint")  # what stage 1 and stage 2 leave
PARTS = Path(__file__).parent / "parts"
BOS = "<s>"  # in the prompts, because TRL adds no special tokens to them
TABLE_PROMPT = STAGE_2_TEMPLATE.format(image=IMAGE_TOKEN, text=DETAIL_PROMPTS[0])  # the paper's Table 3
SHOWN = 12  # pictures on the contact sheet and in `pictures/`
MAX_NEW_TOKENS = 100  # the longest description of the training texts has 43


RECIPES = ("tiny", "tiny_stage2")  # one for each checkpoint
STEPS = 200  # of each stage, as in the recipes
STAGE_1_IMAGES, STAGE_2_IMAGES = 3000, 1200  # different ones; longer training shows them again


def build_model(
    seed: int = 0, with_qformer: bool = True, projector_layers: int = 1
) -> tuple[MiniGPT4ForConditionalGeneration, MiniGPT4Processor]:
    """The shipped frozen parts with a projection drawn at random between them: the state before stage 1."""
    set_seed(seed)
    vision_tower = Blip2VisionModel.from_pretrained(PARTS / "vision_tower", dtype=torch.float32)
    qformer = Blip2QFormerModel.from_pretrained(PARTS / "qformer", dtype=torch.float32)
    query_tokens = load_file(PARTS / "query_tokens.safetensors")["query_tokens"].float()
    language_model = LlamaForCausalLM.from_pretrained(PARTS / "language_model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "language_model")
    config = MiniGPT4Config(
        vision_config=vision_tower.config,
        qformer_config=qformer.config if with_qformer else None,
        text_config=language_model.config,
        num_query_tokens=query_tokens.shape[1],
        projector_layers=projector_layers,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    for part in filter(None, (config.vision_config, config.qformer_config, config.text_config)):
        part.name_or_path = ""  # a path of this machine, which would be saved with the checkpoint
    model = MiniGPT4ForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    if with_qformer:
        model.model.qformer.load_state_dict(qformer.state_dict())
        model.model.query_tokens.data.copy_(query_tokens)
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    processor = MiniGPT4Processor(
        image_processor=BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer=tokenizer,
        image_seq_length=config.image_seq_length,
    )
    model.generation_config = processor.get_generation_config()
    return model.eval(), processor


def stage_1_rows(count: int, seed: int) -> Dataset:
    """At most 3,000 pictures with web captions and no prompt; combinations held out do not occur."""
    count = min(count, STAGE_1_IMAGES)
    return _rows(count, seed, lambda scene, rng: (BOS + IMAGE_TOKEN, web_caption(scene, rng) + "\n"))


def stage_2_rows(count: int, seed: int) -> Dataset:
    """
    At most 1,200 pictures with one of the four instructions and a detailed description.

    Combinations held out do not occur.
    """

    def write(scene: Scene, rng: random.Random) -> tuple[str, str]:
        prompt = BOS + STAGE_2_TEMPLATE.format(image=IMAGE_TOKEN, text=rng.choice(INSTRUCTIONS))
        return prompt, detailed_description(scene, rng) + "###"

    return _rows(min(count, STAGE_2_IMAGES), seed, write)


def _rows(count: int, seed: int, write) -> Dataset:
    rng = random.Random(seed)
    scenes = training_scenes()
    rows = []
    for _ in range(count):
        scene = rng.choice(scenes)
        prompt, completion = write(scene, rng)
        rows.append({"image": draw(scene, rng), "prompt": prompt, "completion": completion})
    features = Features({"image": Image(), "prompt": Value("string"), "completion": Value("string")})
    return Dataset.from_list(rows, features=features)


class _Progress(TrainerCallback):
    """Prints the loss as training goes."""

    def __init__(self, console: Console, name: str):
        self.console = console
        self.name = name

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.console.print(f"{self.name}: step {state.global_step}/{state.max_steps}, loss {logs['loss']:.3f}")


def train_stage(
    recipe: str,
    model: MiniGPT4ForConditionalGeneration,
    processor: MiniGPT4Processor,
    output_dir: Path,
    *,
    steps: int,
    seed: int,
    console: Console,
    title: str | None = None,
    trainable_modules: Sequence[str] = ("projector",),
) -> None:
    """
    Trains one of `RECIPES` in place and leaves its run record in `output_dir`, as `minigpt4 train` would.

    Args:
        recipe: Name of the recipe.
        model: The model; after training it is in evaluation mode.
        processor: Its processor.
        output_dir: Gets the resolved recipe and the loss curve; what an earlier run left there is removed.
        steps: Steps; an eighth of them warms up, as in the recipe.
        seed: Draws the pictures and their order.
        console: Where the loss goes.
        title: What the lines of progress begin with; the recipe's name by default.
        trainable_modules: Parts that learn.
    """
    shutil.rmtree(output_dir, ignore_errors=True)
    settings = {
        "output_dir": output_dir,
        "seed": seed,
        "max_steps": steps,
        "warmup_steps": max(1, steps // 8),
        "logging_steps": max(1, steps // 5),
        "save_strategy": "no",
    }
    overrides = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    stage, config, model_args = parse_recipe(
        ["--config", recipe, *overrides, "--trainable_modules", *trainable_modules]
    )
    trainer = make_trainer(stage, config, model_args, model, processor, load_rows(stage, config))
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Progress(console, title or recipe))
    trainer.train()
    model.eval()


def describe(
    model: MiniGPT4ForConditionalGeneration,
    processor: MiniGPT4Processor,
    pictures: list[Picture],
    prompt: str = TABLE_PROMPT,
) -> tuple[list[str], list[bool]]:
    """Greedy descriptions of pictures, and whether each came to its end mark within 100 new tokens."""
    inputs = processor(images=[[picture] for picture in pictures], text=[prompt] * len(pictures), return_tensors="pt")
    ids = model.generate(
        **inputs, do_sample=False, top_p=None, top_k=None, temperature=None, max_new_tokens=MAX_NEW_TOKENS
    )
    new = ids[:, inputs["input_ids"].shape[1] :]
    ended = ["###" in text or "</s>" in text for text in processor.tokenizer.batch_decode(new)]
    return processor.post_process_image_text_to_text(new), ended


def save_checkpoint(model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor, folder: Path) -> None:
    """Saves model and processor so that `folder` is either as it was or whole, never half written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        model.save_pretrained(new)
        processor.save_pretrained(new)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)


def run_demo(
    output_dir: str | os.PathLike = "minigpt4-demo",
    seed: int = 0,
    stage_1_steps: int = STEPS,
    stage_2_steps: int = STEPS,
    held_out_images: int = 173,
    console: Console | None = None,
) -> dict[str, Any]:
    """
    Trains MiniGPT-4's projection on the small world in its two stages and shows what each brings.

    The vision tower, the Q-Former and the language model are shipped and frozen; they share nothing but the one linear
    layer that the recipes `tiny` and `tiny_stage2` train. Pictures are drawn on the fly. What is measured comes from
    combinations of attributes that no training has shown.

    Args:
        output_dir: Gets `stage1/` and `checkpoint/` (model and processor), `results.json`, `contact_sheet.png`, a few
            held-out pictures in `pictures/` and the records of both runs in `training/`.
        seed: Draws the projection, the pictures and the order of training.
        stage_1_steps: Steps of stage 1.
        stage_2_steps: Steps of stage 2.
        held_out_pictures: Pictures per table, at most one for each of the 173 held-out combinations.
        console: Where progress and tables go; standard output by default.

    Returns:
        `dict`: `shares` (per state, see `summarise`), `seconds`, the prompt, the steps of each recipe and the seed.

    Raises:
        ValueError: for a number of pictures or steps that cannot be.
        FileExistsError: when `output_dir` is a file, or holds a folder of the same name as a checkpoint that is none.
    """
    shown = held_out(seed, held_out_images)
    if min(stage_1_steps, stage_2_steps) < 1:
        raise ValueError(f"Got {stage_1_steps} and {stage_2_steps} steps. Each stage needs at least one.")
    output = Path(output_dir)
    for folder in (output / name for name in CHECKPOINTS):
        if folder.exists() and not (folder / "config.json").is_file():
            raise FileExistsError(
                f"{folder} exists and holds no checkpoint, so the demo will not replace it. Choose another output_dir."
            )
    output.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    with quiet_and_single_threaded():
        return _run(output, seed, (stage_1_steps, stage_2_steps), *shown, console)


@contextlib.contextmanager
def quiet_and_single_threaded() -> Iterator[None]:
    """Silences transformers, and gives torch one thread: matrices this small lose by a second on a busy machine."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def held_out(seed: int, count: int) -> tuple[list[Scene], list[Picture]]:
    """
    What is measured on: combinations that no training shows, and one picture of each.

    Raises:
        ValueError: for a number of pictures that cannot be.
    """
    every = held_out_scenes()
    if not 1 <= count <= len(every):
        raise ValueError(
            f"held_out_pictures={count}, but {len(every)} combinations are held out, one picture each. Choose 1 to "
            f"{len(every)}."
        )
    scenes = random.Random(seed + 1).sample(every, count)
    rng = random.Random(seed + 2)
    return scenes, [draw(scene, rng) for scene in scenes]


def _run(
    output: Path, seed: int, steps: tuple[int, int], scenes: list[Scene], pictures: list[Picture], console: Console
) -> dict[str, Any]:
    start = time.perf_counter()
    model, processor = build_model(seed)
    trained = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"MiniGPT-4 of the small world: {total:,} parameters, of which the projection's {trained:,} learn.")

    shares: dict[str, dict[str, float]] = {}
    answers: dict[str, tuple[list[str], list[bool]]] = {}

    def measure(state: str) -> None:
        texts, ended = answers[state] = describe(model, processor, pictures)
        shares[state] = summarise(texts, scenes, ended)

    measure("before training")
    for number, (recipe, folder) in enumerate(zip(RECIPES, CHECKPOINTS)):
        title, run = f"stage {number + 1}", output / "training" / recipe
        train_stage(recipe, model, processor, run, steps=steps[number], seed=seed, console=console, title=title)
        save_checkpoint(model, processor, output / folder)
        measure(f"after {title}")
        console.print(_table(shares, len(scenes)))
    results = {
        "shares": shares,
        "held_out_pictures": len(scenes),
        "prompt": TABLE_PROMPT,
        "seed": seed,
        "recipes": dict(zip(RECIPES, steps)),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "transformers_minigpt4")},
        "seconds": round(time.perf_counter() - start, 1),
    }
    _write_outputs(output, results, scenes, pictures, answers)
    for what, path in (
        ("checkpoint", output / "checkpoint"),
        ("contact sheet", output / "contact_sheet.png"),
        ("pictures to try it on", output / "images"),
    ):
        console.print(f"{what}: {path}", soft_wrap=True)
    console.print(f"{results['seconds']} seconds in all.")
    return results


def _table(shares: dict[str, dict[str, float]], count: int) -> Table:
    table = Table(title=f"'{DETAIL_PROMPTS[0]}', {count} held-out pictures")
    table.add_column("")
    for state in shares:
        table.add_column(state, justify="right")
    for title, keys in (("named correctly", (*ATTRIBUTES, "attributes")), ("failed outputs", (*FAILURES, "failed"))):
        table.add_section()
        table.add_row(title, style="bold")
        for key in keys:
            name = {"attributes": "mean of the four", "failed": "all three"}.get(key, key)
            table.add_row(f"  {name}", *(f"{100 * share[key]:.1f} %" for share in shares.values()))
    return table


def _write_outputs(
    output: Path,
    results: dict[str, Any],
    scenes: list[Scene],
    pictures: list[Picture],
    answers: dict[str, tuple[list[str], list[bool]]],
) -> None:
    descriptions = [
        {"shown": asdict(scene), **{state: texts[i] for state, (texts, _) in answers.items()}}
        for i, scene in enumerate(scenes)
    ]
    write_json(output / "results.json", {**results, "descriptions": descriptions})
    cells = [
        [(_verdict(state, texts[i], scene, ended[i]), texts[i]) for state, (texts, ended) in answers.items()]
        for i, scene in enumerate(scenes[:SHOWN])
    ]
    save_contact_sheet(output / "contact_sheet.png", pictures[:SHOWN], cells)
    folder = output / "images"
    folder.mkdir(exist_ok=True)
    for scene, picture in list(zip(scenes, pictures))[:SHOWN]:
        picture.save(folder / f"{'-'.join((scene.size, scene.colour, scene.shape, *scene.place.split()))}.png")


def write_json(path: Path, content: Any) -> None:
    """A file appears whole or not at all."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _verdict(state: str, text: str, scene: Scene, ended: bool) -> str:
    right = sum(right_attributes(text, scene).values())
    failed = failure(text, scene, ended)
    return f"{state}: {right} of 4 right{', ' + failed if failed else ''}"
