"""Tiny runs for the tests of training: shared models and sources, trainers, and processes that start quickly."""

import functools
import gc
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from golden_model import ALPHA
from safetensors.torch import load_file
from tiny_models import drawn_image, save_blip2, save_llava, save_minigpt4, save_modern, write_sources
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_minigpt4.training.arguments import StageConfig
from transformers_minigpt4.training.collator import make_collator
from transformers_minigpt4.training.recipe import parse_recipe
from transformers_minigpt4.training.sft import main
from transformers_minigpt4.training.stages import prepare_stage
from transformers_minigpt4.training.trainer import StageSFTTrainer


# Every run of a trainer collects garbage, and would look through all that was imported each time.
gc.collect()
gc.freeze()

SMALL = (
    *("--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--dataloader_num_workers", "0"),
    *("--max_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--save_steps", "2", "--logging_steps", "1", "--check_first_loss", "false", "--report_to", "none"),
    *("--dataloader_pin_memory", "false", "--disable_tqdm", "true"),
)
_scratch = []  # temporary folders of this process, removed when it ends


def _folder() -> Path:
    _scratch.append(tempfile.TemporaryDirectory())
    return Path(_scratch[-1].name)


@functools.cache
def model_folder(name: str) -> Path:
    """A tiny model of the kind that recipes ask for, made once; nobody may write into it."""
    folder = _folder() / name
    golden = json.loads((ALPHA / "golden.json").read_text())
    makers = {
        "minigpt4": lambda: save_minigpt4(folder, golden),
        "llama2": lambda: save_minigpt4(folder, golden, qformer=False, template="llama_2"),
        "no_qformer": lambda: save_minigpt4(folder, golden, qformer=False),
        "three_layers": lambda: save_minigpt4(folder, golden, layers=3),
        "modern": lambda: save_modern(folder),
        "llava": lambda: save_llava(folder),
        "blip2": lambda: save_blip2(folder),
    }
    makers[name]()
    return folder


@functools.cache
def sources() -> dict[str, str]:
    """A source of each kind that recipes name, by kind; nobody may write into them."""
    return write_sources(_folder(), 30)


def run(recipe: str, folder: Path, model: Path | None, source: str | None, *more: str) -> Path:
    """Runs a recipe on a tiny model, and returns its output folder."""
    arguments = ["--config", recipe, *SMALL, "--output_dir", str(folder)]
    if model is not None:
        arguments += ["--model_name_or_path", str(model), "--sources", str(source)]
    main(*parse_recipe([*arguments, *more]))
    return folder


def curve(folder: Path) -> list[float]:
    """Losses of a run, step by step."""
    return [json.loads(line)["loss"] for line in (folder / "loss.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run trained."""
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")


def rows(count: int = 16, mixed: bool = False) -> Dataset:
    """Captions of drawn images; mixed, every second row has no image."""
    made = []
    for i in range(count):
        prompt, images = "<ImageHere>", [drawn_image(i)]
        if mixed and i % 2:
            prompt, images = "###Human: Hi. ###Assistant: ", []
        made.append({"images": images, "prompt": prompt, "completion": f"a small dog and {i} more\n"})
    return Dataset.from_list(made)


def trainer_on(base: Path, folder: Path, data, trainer_class=StageSFTTrainer, collate=None, **settings):
    """A trainer of four steps on the model in `base`; `collate` goes around its collator."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(base)
    prepare_stage(model)
    settings = {
        **{"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1, "bf16": False},
        **{"use_cpu": True, "report_to": "none", "activation_checkpointing": False, "learning_rate": 1e-2},
        **{"disable_tqdm": True, "min_lr": 1e-3, "warmup_steps": 2, "dataloader_pin_memory": False},
        **settings,
    }
    collator = make_collator(model, processor, 32)
    return trainer_class(
        model=model,
        args=StageConfig(str(folder), **settings),
        train_dataset=data,
        data_collator=collate(collator) if collate else collator,
        processing_class=processor,
    )


# A server that has imported everything forks processes in no time; each started anew would import for seconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["peft", "transformers_minigpt4.training.setup", "transformers_minigpt4.training.trainer"]
)


def start(log: Path, function, *arguments, **environment: str):
    """Starts a function in a process of its own, its output in a file."""
    process = _context.Process(target=_in_process, args=(log, environment, function, arguments))
    process.start()
    return process


def launch(processes: int, folder: Path, function, *arguments) -> None:
    """Runs a function in several processes that torch.distributed joins, as `accelerate launch` would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    started = [
        start(folder / f"log-{rank}", function, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(processes)
    ]
    for rank, process in enumerate(started):
        process.join(240)
        process.kill()  # one that hangs
        assert process.exitcode == 0, (folder / f"log-{rank}").read_text()[-4000:]


def _in_process(log: Path, environment: dict[str, str], function, arguments) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(environment)
    # Data workers as in a run of its own: from a server of their own, they would outlive a killed parent for ever.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    function(*arguments)


def run_main(arguments: list[str]) -> None:
    """For [`start`] and [`launch`]: a recipe's command line."""
    main(*parse_recipe(arguments))
