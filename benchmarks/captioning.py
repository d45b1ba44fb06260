"""Images per minute of `describe`: one by one, in batches, with vLLM, and of LLaVA and InstructBLIP of equal size.

    python benchmarks/captioning.py --vllm-python vllm-env/bin/python

Random weights, from JPEG files to captions, each model in its own process; they take turns within every
repeat. docs/benchmarks.md explains the rows.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple


TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "tokenizer"
IMAGE_TOKEN_ID = 1200  # the first id that this tokenizer does not have
END_TOKENS = 0.04  # share of the vocabulary that ends an answer, so that lengths differ
FIXED = {"min_new_tokens": 32, "max_new_tokens": 32}
VARIED = {"max_new_tokens": 64}
IMAGE_SIZE = (640, 480)
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


class Subject(NamedTuple):
    """A row of the table: which process describes, how many images at once, how, and what it is compared to."""

    process: str
    batch_size: int | None
    settings: dict[str, int]
    against: str | None = None


def subjects(batch_size: int, vllm: bool) -> dict[str, Subject]:
    """By name."""
    batches = f"batches of {batch_size}"
    rows = {
        "one by one": Subject("MiniGPT-4", 1, VARIED),
        batches: Subject("MiniGPT-4", batch_size, VARIED, "one by one"),
    }
    if vllm:
        rows["vLLM"] = Subject("vLLM", None, VARIED, batches)
    for name in ("MiniGPT-4", "LLaVA", "InstructBLIP"):
        against = "MiniGPT-4, 32 tokens" if name != "MiniGPT-4" else None
        rows[f"{name}, 32 tokens"] = Subject(name, batch_size, FIXED, against)
    return rows


# Checkpoints and images


def save_checkpoint(name: str, size: str, folder: Path) -> None:
    """A model of `peers` with random weights, its processor, and end tokens that make answers of different lengths."""
    import torch
    from peers import IMAGE, NUM_QUERY_TOKENS, OURS, SIZES, build_config
    from transformers import (
        AutoModelForImageTextToText,
        AutoTokenizer,
        BlipImageProcessorPil,
        GenerationConfig,
        InstructBlipProcessor,
        LlavaProcessor,
    )

    from transformers_minigpt4 import MiniGPT4Processor

    torch.manual_seed(0)
    config = build_config(name, SIZES[size], IMAGE_TOKEN_ID)
    config.text_config.initializer_range = 0.1  # with the default of 0.02 all answers are the same token
    model = AutoModelForImageTextToText.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    images = BlipImageProcessorPil(size={"height": IMAGE["image_size"], "width": IMAGE["image_size"]})
    if name == OURS:
        processor = MiniGPT4Processor(images, tokenizer, image_seq_length=config.image_seq_length)
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        tokenizer.pad_token = tokenizer.unk_token
        if name == "LLaVA":
            processor = LlavaProcessor(
                images,
                tokenizer,
                patch_size=IMAGE["patch_size"],
                vision_feature_select_strategy="default",
                num_additional_image_tokens=1,
                chat_template=TEMPLATE,
            )
        else:
            processor = InstructBlipProcessor(images, tokenizer, tokenizer, num_query_tokens=NUM_QUERY_TOKENS)
    ends = random.Random(0).sample(range(3, IMAGE_TOKEN_ID), int(END_TOKENS * IMAGE_TOKEN_ID))
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0, eos_token_id=ends)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def draw_images(folder: Path, count: int) -> None:
    from PIL import Image, ImageDraw

    folder.mkdir()
    draw = random.Random(0)
    for number in range(count):
        image = Image.new("RGB", IMAGE_SIZE, tuple(draw.randrange(256) for _ in range(3)))
        shapes = ImageDraw.Draw(image)
        for _ in range(20):
            left, top = draw.randrange(IMAGE_SIZE[0]), draw.randrange(IMAGE_SIZE[1])
            box = (left, top, left + draw.randrange(20, 300), top + draw.randrange(20, 300))
            shapes.ellipse(box, fill=tuple(draw.randrange(256) for _ in range(3)))
        image.save(folder / f"{number:04d}.jpg", quality=90)


# The processes that describe


def work(engine_name: str, checkpoint: str, images: str, batch_size: int, threads: int) -> None:
    """Describes all images each time it reads a line of settings, and writes how long that took and the captions."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    import torch

    from transformers_minigpt4.inference.describe import describe
    from transformers_minigpt4.inference.engines import TransformersEngine
    from transformers_minigpt4.inference.loading import load_engine

    torch.set_num_threads(threads)
    engine = load_engine(
        engine_name, checkpoint, batch_size=batch_size if engine_name == "vllm" else None, dtype="float32"
    )
    files = sorted(Path(images).iterdir())
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if isinstance(engine, TransformersEngine):
            engine.batch_size = order["batch_size"]
        start = time.perf_counter()
        records = list(describe(files[: order["images"]], engine, do_sample=False, **order["settings"]))
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "captions": [r["caption"] for r in records]}), file=answers, flush=True)


class Process:
    """A process of `work`."""

    def __init__(self, python: str, engine: str, checkpoint: Path, images: Path, args: argparse.Namespace) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"OMP_NUM_THREADS": str(args.threads)}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        command = [python, __file__, "--work", engine, checkpoint, images, args.batch_size, args.threads]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.name = f"{engine} on {checkpoint.name}"

    def ask(self, order: dict | None = None) -> dict:
        if order is not None:
            print(json.dumps(order), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The process of {self.name} has ended; --verbose shows what it wrote.")
        return json.loads(line)


@contextmanager
def processes(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Process]]:
    """By name; started one after the other."""
    draw_images(folder / "images", args.images)
    wanted = {name: (sys.executable, "transformers", name) for name in ("MiniGPT-4", "LLaVA", "InstructBLIP")}
    if args.vllm_python is not None:
        wanted["vLLM"] = (str(args.vllm_python), "vllm", "MiniGPT-4")
    with ExitStack() as stack:
        running = {}
        for name, (python, engine, model) in wanted.items():
            checkpoint = folder / model
            if not checkpoint.exists():
                save_checkpoint(model, args.size, checkpoint)
            process = running[name] = Process(python, engine, checkpoint, folder / "images", args)
            stack.callback(process.process.wait)
            stack.callback(process.process.stdin.close)
            process.ask()
            print(f"{name} is ready", flush=True)
        yield running


# Measurements


def measure(
    rows: Mapping[str, Subject], running: dict[str, Process], args: argparse.Namespace
) -> dict[str, list[float]]:
    """
    Seconds of every repeat, by row.

    Raises:
        RuntimeError: if batches or vLLM do not give the captions of one image after the other.
    """
    from report import in_turn

    seconds: dict[str, list[float]] = {name: [] for name in rows}
    captions: dict[str, list[str]] = {}
    for repeat in range(-1, args.repeats):  # repeat -1 warms up
        for name in in_turn(list(rows), repeat):
            row = rows[name]
            images = min(2, args.images) if repeat < 0 else args.images
            order = {"batch_size": row.batch_size, "settings": row.settings, "images": images}
            found = running[row.process].ask(order)
            if repeat >= 0:
                seconds[name].append(found["seconds"])
                captions[name] = found["captions"]
        print(f"repeat {repeat + 1} of {args.repeats}", flush=True)
    expected = captions["one by one"]
    for name, row in rows.items():
        different = sum(mine != theirs for mine, theirs in zip(expected, captions[name]))
        if row.settings is VARIED and different:
            raise RuntimeError(
                f"{different} of {args.images} captions of {name} differ from those of one image after the other, so "
                "that timings would compare different work."
            )
    words = [len(caption.split()) for caption in expected]
    print(f"\n{len(set(expected))} different captions, of {min(words)} to {max(words)} words")
    return seconds


def table(rows: Mapping[str, Subject], seconds: dict[str, list[float]], images: int) -> list[str]:
    """Markdown lines: images per minute by the median, and the median over the repeats of the ratio to another row."""
    lines = ["| | images/min | ratio |", "| --- | ---: | --- |"]
    for name, row in rows.items():
        rate = 60 * images / statistics.median(seconds[name])
        ratio = ""
        if row.against is not None:
            ratios = [theirs / mine for theirs, mine in zip(seconds[row.against], seconds[name])]
            ratio = f"{statistics.median(ratios):.2f} × {row.against}"
        lines.append(f"| {name} | {rate:.1f} | {ratio} |")
    return lines


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, help="the Python of an environment with vLLM and this package")
    parser.add_argument("--size", choices=("tiny", "small"), default="small", help="size of the models")
    parser.add_argument("--images", type=int, default=24, help="images of each measurement (default: 24)")
    parser.add_argument("--batch-size", type=int, default=8, help="images at once (default: 8)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--repeats", type=int, default=3, help="measured repeats (default: 3)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every measurement to this file")
    parser.add_argument("--verbose", action="store_true", help="show what the processes write")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        engine, checkpoint, images, batch_size, threads = sys.argv[2:]
        work(engine, checkpoint, images, int(batch_size), int(threads))
        return
    args = parse_args()
    rows = subjects(args.batch_size, args.vllm_python is not None)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, processes(args, Path(folder)) as running:
        seconds = measure(rows, running, args)
    print(
        f"\nSize {args.size}, CPU, float32, {args.threads} threads, {args.images} images, {args.repeats} repeats; "
        f"the run took {(time.perf_counter() - start) / 60:.1f} minutes.\n"
    )
    print("\n".join(table(rows, seconds, args.images)))
    if args.json is not None:
        args.json.write_text(json.dumps({"options": vars(args), "seconds": seconds}, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
