"""Runs the demo: both training stages on the toy world, a table after each, a checkpoint and a contact sheet."""

import contextlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch
from datasets import Dataset, Features, Image, Value
from PIL.Image import Image as PILImage
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Blip2QFormerModel,
    Blip2VisionModel,
    BlipImageProcessorPil,
    LlamaForCausalLM,
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from transformers_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from transformers_minigpt4.conversion.weight_record import save_record
from transformers_minigpt4.inference.generation import generate_ids
from transformers_minigpt4.training.loading import load_rows
from transformers_minigpt4.training.progress import TrainingProgress
from transformers_minigpt4.training.recipe import parse_recipe
from transformers_minigpt4.training.setup import make_trainer
from transformers_minigpt4.training.stages import trainable_parameters
from transformers_minigpt4.utils.file_names import RUN_FILE
from transformers_minigpt4.utils.files import atomic_folder, write_json
from transformers_minigpt4.utils.models import GenerativeModel
from transformers_minigpt4.utils.versions import PACKAGE, package_versions

from .contact_sheet import save_contact_sheet
from .scoring import FAILURES, failure, right_attributes, summarize
from .texts import DETAIL_PROMPTS, IMAGE_TOKEN, INSTRUCTIONS, STAGE_2_TEMPLATE, detailed_description, web_caption
from .world import ATTRIBUTES, IMAGE_SIZE, Scene, draw, held_out_scenes, training_scenes


CHECKPOINTS = ("stage1", "checkpoint")  # what stage 1 and stage 2 leave
BASE = Path(__file__).parent / "base"
BOS = "<s>"  # in the prompts, because TRL adds no special tokens to them
TABLE_PROMPT = STAGE_2_TEMPLATE.format(image=IMAGE_TOKEN, text=DETAIL_PROMPTS[0])  # the paper's Table 3
SHOWN = 12  # images on the contact sheet and in `images/`
MAX_NEW_TOKENS = 100  # the longest description of the training texts has 43

RECIPES = ("tiny", "tiny_stage2")  # one for each checkpoint
STEPS = 200  # of each stage, as in the recipes
STAGE_1_IMAGES, STAGE_2_IMAGES = 3000, 1200  # different ones; longer training shows them again


def build_model(
    seed: int = 0, with_qformer: bool = True, projector_layers: int = 1
) -> tuple[MiniGPT4ForConditionalGeneration, MiniGPT4Processor]:
    """The shipped frozen modules with a randomly initialised projector between them: the state before stage 1."""
    set_seed(seed)
    vision_tower = Blip2VisionModel.from_pretrained(BASE / "vision_tower", dtype=torch.float32)
    qformer = Blip2QFormerModel.from_pretrained(BASE / "qformer", dtype=torch.float32)
    query_tokens = load_file(BASE / "query_tokens.safetensors")["query_tokens"].float()
    language_model = LlamaForCausalLM.from_pretrained(BASE / "language_model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE / "language_model")
    config = MiniGPT4Config(
        vision_config=vision_tower.config,
        qformer_config=qformer.config if with_qformer else None,
        text_config=language_model.config,
        num_query_tokens=query_tokens.shape[1],
        projector_layers=projector_layers,
        image_token_id=tokenizer.get_vocab()[IMAGE_TOKEN],
    )
    for module in filter(None, (config.vision_config, config.qformer_config, config.text_config)):
        module.name_or_path = ""  # a path of this machine, which would be saved with the checkpoint
    model = MiniGPT4ForConditionalGeneration(config)
    model.model.get_submodule("vision_tower").load_state_dict(vision_tower.state_dict())
    if model.model.qformer is not None:
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
    """At most 3,000 images with web captions and no prompt; held-out combinations are left out."""
    count = min(count, STAGE_1_IMAGES)
    return _rows(count, seed, lambda scene, rng: (BOS + IMAGE_TOKEN, web_caption(scene, rng) + "\n"))


def stage_2_rows(count: int, seed: int) -> Dataset:
    """
    At most 1,200 images with one of the four instructions and a detailed description.

    Held-out combinations are left out.
    """

    def write(scene: Scene, rng: random.Random) -> tuple[str, str]:
        prompt = BOS + STAGE_2_TEMPLATE.format(image=IMAGE_TOKEN, text=rng.choice(INSTRUCTIONS))
        return prompt, detailed_description(scene, rng) + "###"

    return _rows(min(count, STAGE_2_IMAGES), seed, write)


def _rows(count: int, seed: int, write: Callable[[Scene, random.Random], tuple[str, str]]) -> Dataset:
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
    """Prints the loss during training."""

    def __init__(self, console: Console, name: str) -> None:
        self.console = console
        self.name = name

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.console.print(f"{self.name}: step {state.global_step}/{state.max_steps}, loss {logs['loss']:.3f}")


def train_stage(
    recipe: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    output_dir: Path,
    *,
    steps: int,
    seed: int,
    console: Console,
    title: str | None = None,
    trainable_modules: Sequence[str] = ("projector",),
    changes: Mapping[str, object] | None = None,
) -> None:
    """
    Trains a recipe in place and leaves its run info in `output_dir`, as `minigpt4 train` would.

    Args:
        recipe: Name of the recipe.
        model: The model; after training it is in evaluation mode.
        processor: Its processor.
        output_dir: Receives the resolved recipe and the loss curve; the output of an earlier run is removed.
        steps: Training steps; the first eighth warms up, as in the recipe.
        seed: Draws the images and their order.
        console: Where the loss goes.
        title: Prefix of the progress lines; the recipe's name by default.
        trainable_modules: Modules to train; the others stay frozen.
        changes: Further keys of the recipe and their values.
    """
    shutil.rmtree(output_dir, ignore_errors=True)
    settings = {
        "output_dir": output_dir,
        "seed": seed,
        "max_steps": steps,
        "warmup_steps": max(1, steps // 8),
        "logging_steps": max(1, steps // 5),
        "save_strategy": "no",
        **(changes or {}),
    }
    overrides = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    stage, config, model_args = parse_recipe(
        ["--config", recipe, *overrides, "--trainable_modules", *trainable_modules]
    )
    trainer = make_trainer(stage, config, model_args, model, processor, load_rows(stage, config))
    trainer.remove_callback(TrainingProgress)
    trainer.add_callback(_Progress(console, title or recipe))
    trainer.train()
    if isinstance(model, MiniGPT4ForConditionalGeneration):  # its stage 2 asks whether the projector has been trained
        trained = {*(model.config.trained_parameters or []), *trainable_parameters(model)}
        model.config.trained_parameters = sorted(trained)
    model.eval()


def describe(
    model: GenerativeModel, processor: MiniGPT4Processor, images: list[PILImage], prompt: str = TABLE_PROMPT
) -> tuple[list[str], list[bool]]:
    """Greedy descriptions of images, and whether each reached its stop string within 100 new tokens."""
    inputs = processor(images=[[image] for image in images], text=[prompt] * len(images), return_tensors="pt")
    new = generate_ids(
        model, inputs, do_sample=False, top_p=None, top_k=None, temperature=None, max_new_tokens=MAX_NEW_TOKENS
    )
    ended = ["###" in text or "</s>" in text for text in processor.tokenizer.batch_decode(new)]
    return processor.post_process_image_text_to_text(new), ended


def save_checkpoint(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, run: Path) -> None:
    """
    Saves model, processor and the run info of `run` in one step: `folder` is either as before or complete.

    By the run info, `minigpt4 describe` knows a model of the toy world.
    """
    with atomic_folder(folder) as new:
        model.save_pretrained(new)
        processor.save_pretrained(new)
        shutil.copyfile(run / RUN_FILE, new / RUN_FILE)
        save_record(new)


class DemoResults(TypedDict):
    """What `results.json` holds, apart from the descriptions; `shares` is by state, see `scoring.summarize`."""

    shares: dict[str, dict[str, float]]
    held_out_images: int
    prompt: str
    seed: int
    recipes: dict[str, int]
    versions: dict[str, str]
    seconds: float


def run_demo(
    output_dir: str | os.PathLike = "minigpt4-demo",
    seed: int = 0,
    stage_1_steps: int = STEPS,
    stage_2_steps: int = STEPS,
    held_out_images: int = 173,
    console: Console | None = None,
) -> DemoResults:
    """
    Trains MiniGPT-4's projector on the toy world in its two stages and shows what each one adds.

    The vision tower, the Q-Former and the language model are shipped and frozen; only the one linear layer between
    them is trained, with the recipes `tiny` and `tiny_stage2`. Images are drawn on the fly. The measurements use
    combinations of attributes that no training stage has shown.

    Args:
        output_dir: Receives `stage1/` and `checkpoint/` (model and processor), `results.json`, `contact_sheet.png`, a
            few held-out images in `images/` and the run info of both stages in `training/`.
        seed: Draws the projector, the images and the order of training.
        stage_1_steps: Steps of stage 1.
        stage_2_steps: Steps of stage 2.
        held_out_images: Images per table, at most one for each of the 173 held-out combinations.
        console: Where progress and tables go; standard output by default.

    Returns:
        `DemoResults`: a dict.

    Raises:
        ValueError: for an impossible number of images or steps.
        FileExistsError: when `output_dir` is a file, or a folder in it has a checkpoint's name but no checkpoint.
    """
    shown = held_out(seed, held_out_images)
    if min(stage_1_steps, stage_2_steps) < 1:
        raise ValueError(f"Got {stage_1_steps} and {stage_2_steps} steps. Each stage needs at least one.")
    output = Path(output_dir)
    for folder in (output / name for name in CHECKPOINTS):
        if folder.exists() and not (folder / "config.json").is_file():
            raise FileExistsError(
                f"{folder} exists but is not a checkpoint, so the demo will not replace it. Choose another --output."
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


def held_out(seed: int, count: int) -> tuple[list[Scene], list[PILImage]]:
    """
    The test set: combinations that no training stage shows, and one image of each.

    Raises:
        ValueError: for an impossible number of images.
    """
    every = held_out_scenes()
    if not 1 <= count <= len(every):
        raise ValueError(
            f"held_out_images={count}, but {len(every)} combinations are held out, with one image each. Choose 1 to "
            f"{len(every)}."
        )
    scenes = random.Random(seed + 1).sample(every, count)
    rng = random.Random(seed + 2)
    return scenes, [draw(scene, rng) for scene in scenes]


def _run(
    output: Path, seed: int, steps: tuple[int, int], scenes: list[Scene], images: list[PILImage], console: Console
) -> DemoResults:
    start = time.perf_counter()
    model, processor = build_model(seed)
    trained = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"Toy MiniGPT-4: {total:,} parameters, of which the projector's {trained:,} are trained.", highlight=False
    )

    shares: dict[str, dict[str, float]] = {}
    answers: dict[str, tuple[list[str], list[bool]]] = {}

    def measure(state: str) -> None:
        texts, ended = answers[state] = describe(model, processor, images)
        shares[state] = summarize(texts, scenes, ended)

    measure("before training")
    for number, (recipe, folder) in enumerate(zip(RECIPES, CHECKPOINTS)):
        title, run = f"stage {number + 1}", output / "training" / recipe
        train_stage(recipe, model, processor, run, steps=steps[number], seed=seed, console=console, title=title)
        save_checkpoint(model, processor, output / folder, run)
        measure(f"after {title}")
        console.print(_table(shares, len(scenes)))
    results: DemoResults = {
        "shares": shares,
        "held_out_images": len(scenes),
        "prompt": TABLE_PROMPT,
        "seed": seed,
        "recipes": dict(zip(RECIPES, steps)),
        "versions": package_versions(("torch", "transformers", "trl", PACKAGE)),
        "seconds": round(time.perf_counter() - start, 1),
    }
    _write_outputs(output, results, scenes, images, answers)
    for what, path in (
        ("checkpoint", output / "checkpoint"),
        ("contact sheet", output / "contact_sheet.png"),
        ("images to try it on", output / "images"),
    ):
        console.print(f"{what}: {path}", soft_wrap=True)
    console.print(f"{results['seconds']} seconds in total.")
    return results


_SHOWN_AS = {"attributes": "mean of the four", "colour": "color", "failed": "all three"}  # keys of the results


def _table(shares: dict[str, dict[str, float]], count: int) -> Table:
    table = Table(title=f"'{DETAIL_PROMPTS[0]}', {count} held-out images")
    table.add_column("")
    for state in shares:
        table.add_column(state, justify="right")
    for title, keys in (("named correctly", (*ATTRIBUTES, "attributes")), ("failed outputs", (*FAILURES, "failed"))):
        table.add_section()
        table.add_row(title, style="bold")
        for key in keys:
            name = _SHOWN_AS.get(key, key)
            table.add_row(f"  {name}", *(f"{100 * share[key]:.1f} %" for share in shares.values()))
    return table


def _write_outputs(
    output: Path,
    results: DemoResults,
    scenes: list[Scene],
    images: list[PILImage],
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
    save_contact_sheet(output / "contact_sheet.png", images[:SHOWN], cells)
    folder = output / "images"
    folder.mkdir(exist_ok=True)
    for scene, image in list(zip(scenes, images))[:SHOWN]:
        image.save(folder / f"{'-'.join((scene.size, scene.colour, scene.shape, *scene.place.split()))}.png")


def _verdict(state: str, text: str, scene: Scene, ended: bool) -> str:
    right = sum(right_attributes(text, scene).values())
    failed = failure(text, scene, ended)
    return f"{state}: {right} of 4 right{', ' + failed if failed else ''}"
