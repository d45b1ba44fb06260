"""Fixtures shared by all tests: the tiny model of the golden files, and a folder that holds it."""

import gc
import json
import os

import pytest
import torch
from filelock import FileLock
from golden_model import ALPHA, GOLDEN, golden_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, logging
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from transformers_minigpt4 import MiniGPT4Processor


logging.disable_progress_bar()
# Every trainer collects garbage, and would look through all that was imported each time.
gc.collect()
gc.freeze()
# pytest-xdist runs as many workers as there are cores; threads of each on every core would only stand in the way. The
# programs that tests start take it from here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def golden() -> dict:
    """`golden.json`: what went into the authors' code, and its ids, losses and answers."""
    return json.loads((ALPHA / "golden.json").read_text())


@pytest.fixture(scope="session")
def golden_tensors() -> dict[str, torch.Tensor]:
    return load_file(ALPHA / "golden.safetensors")


def build_processor(**kwargs) -> MiniGPT4Processor:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    image_processor = BlipImageProcessorPil(size={"height": 56, "width": 56})
    return MiniGPT4Processor(image_processor, tokenizer, image_seq_length=8, **kwargs)


@pytest.fixture(scope="session")
def processor() -> MiniGPT4Processor:
    return build_processor()


@pytest.fixture
def model(golden, processor):
    """The golden model, fresh for each test."""
    model = golden_model(golden["config"])
    model.generation_config = processor.get_generation_config()
    return model


@pytest.fixture(scope="session")
def tiny_checkpoint(golden, processor, tmp_path_factory) -> str:
    """A saved folder with model, processor and generation config."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    model = golden_model(golden["config"])
    model.generation_config = processor.get_generation_config()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Three different pictures."""
    colours = [(200, 30, 30), (30, 160, 60), (40, 60, 220)]
    images = []
    for i, colour in enumerate(colours):
        image = Image.new("RGB", (90, 60), (240, 240, 240))
        image.paste(colour, (10 + 15 * i, 10, 40 + 15 * i, 45))
        images.append(image)
    return images


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory, worker_id):
    """The folder that `minigpt4 demo` leaves after its full run; read it, and write elsewhere."""
    from transformers_minigpt4.demo.run import run_demo

    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        shared = shared.parent  # one run for all of pytest-xdist's workers
    folder = shared / "minigpt4-demo"
    with FileLock(shared / "minigpt4-demo.lock"):
        if not (folder / "results.json").is_file():
            run_demo(folder)
    return folder
