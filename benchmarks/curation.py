"""Measures curation: batches, the second turn from the first one's cache, the filter, and the review's page.

    python benchmarks/curation.py
    python benchmarks/curation.py --images 4 --size tiny --repeats 1 --pairs 500 --review-pairs 50   # seconds

Generation: the complete step (loading the model, images, both turns, results to the disk) on the demo's model with a
random projector, one image at a time and in batches, in turns. The texts must agree. Second turn: the same tokens with
the first turn's keys and values and computed from pixels and ids, in turns. Filter: a project whose texts are composed
of words; its images only need to exist, as their hashes are computed once and measured separately. Review: every press
of a button is an HTTP request to the served page.

Times are CPU times, which other programs on the machine hardly change; those of the page are what the reviewer waits.
"""

import argparse
import copy
import dataclasses
import gc
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from peers import OURS, SIZES, build_inputs, build_model
from PIL import Image
from transformers.utils import logging

from transformers_minigpt4.curation.config import CurationConfig
from transformers_minigpt4.curation.duplicates import HASH_BYTES, near_duplicate_hash
from transformers_minigpt4.curation.filter import run_filter
from transformers_minigpt4.curation.generate import run_generate
from transformers_minigpt4.curation.records import IMAGES, Result
from transformers_minigpt4.curation.review_page import serve_review
from transformers_minigpt4.curation.sampling import sample_images
from transformers_minigpt4.curation.store import Project
from transformers_minigpt4.curation.turns import continue_answers, continue_inputs
from transformers_minigpt4.demo.run import build_model as build_demo_model
from transformers_minigpt4.llm.types import ChatSettings


SOURCE = "python:transformers_minigpt4.demo.curation_images:images"
ROWS = 8  # of the second turn's batch
FIRST_TOKENS, SECOND_TOKENS = (20, 60), 32  # answers of the first turn, drawn; of the second, a stage-1 caption's most
TURN_TOKENS = 12  # of `###Human: Continue ###Assistant:` in LLaMA's vocabulary
LIMITS = {"batched": 4.0, "second turn": 0.60, "filter": 60.0, "review": 0.200}

ADJECTIVES = (
    *("small", "large", "red", "green", "old", "new", "bright", "dark", "wooden", "white", "blue", "empty", "round"),
    *("tall", "narrow", "wide", "grey", "young", "quiet", "open", "wet", "dry", "warm", "broken", "heavy", "golden"),
)
NOUNS = (
    *("house", "tree", "dog", "woman", "man", "table", "chair", "street", "car", "window", "door", "bird", "boat"),
    *("bridge", "child", "horse", "garden", "river", "bench", "lamp", "cup", "book", "kitchen", "train", "field"),
    *("mountain", "church", "market", "bicycle", "shelf", "clock", "painting", "hill", "fence", "beach", "tower"),
)
SENTENCES = (
    "The picture shows a {0} {1} beside a {2} {3}.",
    "In front of the {0} {1} there is a {2} {3}, which looks {4}.",
    "A {0} {1} stands behind the {3}, and the light on it is {2}.",
    "On the left one can see a {0} {1} with a {2} {3}.",
    "The {1} in the middle is {0}, while the {3} next to it is {2}.",
    "Far behind them lies a {0} {1}, partly hidden by the {2} {3}.",
)
BAD = ("I'm sorry, I made a mistake.", "The the the same again", "as an AI language model I cannot say", "of the")


def generation(images: int, batch: int, repeats: int, scratch: Path) -> dict[int, list[float]]:
    """CPU seconds of `run_generate` by batch size, after one run of each that warms up."""
    model, processor = build_demo_model()
    model.save_pretrained(scratch / "model")
    processor.save_pretrained(scratch / "model")
    seconds: dict[int, list[float]] = {1: [], batch: []}
    texts = set()
    for repeat in range(-1, repeats):
        for size in list(seconds) if repeat % 2 else list(seconds)[::-1]:
            config = CurationConfig(
                SOURCE, str(scratch / "model"), images=images, batch_size=size, max_new_tokens=60, device="cpu"
            )
            with Project.create(scratch / f"{repeat}-{size}", config) as project:
                sample_images(project, config, progress=False)
                start = time.process_time()
                run_generate(project, config, progress=False)
                if repeat >= 0:
                    seconds[size].append(time.process_time() - start)
                texts.add(json.dumps([text for _, text in project.texts("filter")]))
    if len(texts) > 1:
        raise SystemExit("batches and single images gave different texts; the times cannot be compared")
    return seconds


def second_turn(size: str, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of the second turn, and of its way to the first token, with the first turn's cache and without."""
    model = build_model(OURS, SIZES[size], torch.float32, "cpu")
    inputs = build_inputs(model, ROWS)
    width, rows = inputs["input_ids"].shape[1], torch.arange(ROWS)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(*FIRST_TOKENS, (ROWS,), generator=draw)
    turn = torch.randint(3, 32000, (1, TURN_TOKENS), generator=draw)
    first = model.generate(**inputs, max_new_tokens=FIRST_TOKENS[1], do_sample=False, return_dict_in_generate=True)
    ids, mask = continue_inputs(first.sequences, width, lengths, rows, turn)
    seconds: dict[str, list[float]] = {f"{way}, {part}": [] for way in ("cache", "anew") for part in ("all", "first")}
    said: dict[str, torch.Tensor] = {}
    for repeat in range(-1, repeats):
        for name in list(seconds) if repeat % 2 else list(seconds)[::-1]:
            settings = {"max_new_tokens": SECOND_TOKENS if name.endswith("all") else 1, "do_sample": False}
            output = dataclasses.replace(first, past_key_values=copy.deepcopy(first.past_key_values))
            start = time.process_time()
            if name.startswith("cache"):
                answers = continue_answers(model, output, width, lengths, rows, turn, **settings)
            else:
                sequences = model.generate(
                    input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], **settings
                )
                answers = sequences[:, ids.shape[1] :]
            if repeat >= 0:
                seconds[name].append(time.process_time() - start)
            said[name] = answers
    if not torch.equal(said["cache, all"], said["anew, all"]):
        raise SystemExit("the two ways gave different tokens; their times cannot be compared")
    return seconds


def description(rng: random.Random) -> str:
    """Five sentences of about 60 words; one text in twenty has an error that the rules know."""
    sentences = []
    for _ in range(5):
        words = (rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(ADJECTIVES), rng.choice(NOUNS))
        sentences.append(rng.choice(SENTENCES).format(*words, rng.choice(ADJECTIVES)))
    if rng.random() < 0.05:
        sentences.append(rng.choice(BAD))
    return " ".join(sentences)


def described_project(folder: Path, pairs: int, repair: bool = False) -> Project:
    """A project whose pairs have texts; one file serves as all images."""
    config = CurationConfig("imagefolder:x", "x", images=pairs, repair=ChatSettings("x") if repair else None)
    folder.mkdir()
    project = Project.create(folder, config)
    rng = random.Random(0)
    texts = [description(rng) for _ in range(pairs)]
    (folder / IMAGES / "0.jpg").write_bytes(photograph(0))
    project.add_pairs([(f"{n:06d}", f"{IMAGES}/0.jpg", f"{n}", {"key": n}) for n in range(pairs)], "somewhere")
    project.record("generate", _results(project, "generate", texts, "ok"))
    if repair:
        project.record("repair", _results(project, "repair", [f"{text} It ends here." for text in texts], "ok"))
        project.record("filter", _results(project, "filter", [None] * pairs, "kept"))
    return project


def _results(project: Project, step: str, texts: Sequence[str | None], outcome: str) -> list[Result]:
    works = list(project.pending(step, "s"))
    return [Result(w.pair.id, "s", w.input, outcome, text=text) for w, text in zip(works, texts, strict=True)]


def photograph(seed: int) -> bytes:
    """A JPEG of 320 x 240 with soft patches of colour."""
    fields = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(fields).resize((320, 240), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def filtering(pairs: int, scratch: Path) -> dict[str, float]:
    """CPU seconds of the filter for all pairs, and after a changed rule; and of one image's hash."""
    with described_project(scratch / "filter", pairs) as project:
        # Random hashes, as of images that have nothing in common.
        hashes = np.random.default_rng(0).integers(0, 256, (pairs, HASH_BYTES), dtype=np.uint8)
        with project.transaction() as connection:
            connection.execute("CREATE TABLE image_hashes (pair_id INTEGER PRIMARY KEY, hash BLOB NOT NULL)")
            rows = [(pair.id, one.tobytes()) for pair, one in zip(project.pairs(), hashes)]
            connection.executemany("INSERT INTO image_hashes VALUES (?, ?)", rows)
        found = {}
        for name, rules in (("all pairs", {}), ("a changed rule", {"too_short": {"min_words": 12}})):
            config = dataclasses.replace(project.config, rules=rules)
            start = time.process_time()
            summary = run_filter(project, config, progress=False)
            found[name] = time.process_time() - start
            found[f"{name}, kept"] = summary.kept
    images = []
    for number in range(200):
        images.append(scratch / f"{number}.jpg")
        images[-1].write_bytes(photograph(number))
    start = time.process_time()
    for path in images:
        near_duplicate_hash(path)
    found["one hash"] = (time.process_time() - start) / len(images)
    return found


def reviewing(pairs: int, presses: int, scratch: Path) -> dict[str, list[float]]:
    """Seconds from the press of a button to the complete answer, by button."""
    names = ("start", "accept", "save", "reason-1", "jump", "list", "undo")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with (
        described_project(scratch / "review", pairs, repair=True) as project,
        serve_review(project) as server,
        httpx.Client(timeout=60) as client,
    ):

        def press(button: str, *data: str) -> list[str]:
            start = time.perf_counter()
            answer = client.post(f"{server.url}gradio_api/run/{button}", json={"data": list(data)})
            answer.raise_for_status()
            seconds[button].append(time.perf_counter() - start)
            return answer.json()["data"]

        for _ in range(presses):
            *_, text, shown, reviewer = press("start", "anna")
            *_, text, shown, reviewer = press("accept", reviewer, shown, text)
            *_, text, shown, reviewer = press("save", reviewer, shown, f"{text} And one more.")
            *_, text, shown, reviewer = press("reason-1", reviewer, shown)
            *_, text, shown, reviewer = press("jump", reviewer, str(pairs))
            press("list", reviewer, "all", "", "and one more")
            press("undo", reviewer)
        decided = project.connection().execute("SELECT count(*) FROM decisions WHERE undone IS NULL").fetchone()[0]
    if decided != 2 * presses:
        raise SystemExit(f"{decided} decisions are on the disk, expected {2 * presses}")
    return seconds


def table(results: dict[str, Any]) -> list[str]:
    """Markdown lines: what is measured, the figure, and what it must be."""
    middle = statistics.median
    single, batched = (results["generation"][size] for size in (1, results["batch"]))
    ratios = [one / other for one, other in zip(single, batched)]
    per_minute = [60 * results["images"] / middle(seconds) for seconds in (single, batched)]
    turn = {name: middle(seconds) for name, seconds in results["second turn"].items()}
    whole = [one / other for one, other in zip(*(results["second turn"][f"{w}, all"] for w in ("cache", "anew")))]
    start, *review = [second for seconds in results["review"].values() for second in seconds]
    actions = {name: middle(seconds) for name, seconds in results["review"].items()}
    slowest = max(actions, key=lambda name: actions[name])
    kept = results["filter"]
    return [
        "| | measured | wanted |",
        "| --- | ---: | ---: |",
        f"| captions per CPU minute, one at a time | {per_minute[0]:.0f} | |",
        f"| captions per CPU minute, batches of {results['batch']} | {per_minute[1]:.0f} | |",
        f"| batched over one at a time | {middle(ratios):.1f} | ≥ {LIMITS['batched']:.0f} |",
        f"| second turn of {ROWS} rows from the first one's cache (CPU ms) | {turn['cache, all'] * 1000:.0f} | |",
        f"| the same, recomputed (CPU ms) | {turn['anew, all'] * 1000:.0f} | |",
        f"| share of it | {middle(whole):.0%} | < {LIMITS['second turn']:.0%} |",
        f"| up to the first token alone | {turn['cache, first'] / turn['anew, first']:.0%} | |",
        f"| filter, {results['pairs']:,} pairs (CPU s) | {kept['all pairs']:.1f} | < {LIMITS['filter']:.0f} |",
        f"| the same after one changed rule (CPU s) | {kept['a changed rule']:.1f} | |",
        f"| hash of a new image, once (CPU ms) | {kept['one hash'] * 1000:.2f} | |",
        f"| review page, {results['review pairs']:,} pairs: median answer (ms) | {middle(review) * 1000:.0f} | "
        f"< {LIMITS['review'] * 1000:.0f} |",
        f"| the slowest of its actions, {slowest}: median (ms) | {actions[slowest] * 1000:.0f} | "
        f"< {LIMITS['review'] * 1000:.0f} |",
        f"| the first answer of a server, once (ms) | {start * 1000:.0f} | |",
        f"| slowest of {len(review)} others (ms) | {max(review) * 1000:.0f} | |",
    ]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="to describe")
    parser.add_argument("--batch", type=int, default=32, help="images that go through the model at once")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the second turn's model, see peers.py")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=100_000, help="through the filter")
    parser.add_argument("--review-pairs", type=int, default=5_000)
    parser.add_argument("--presses", type=int, default=20, help="of each button of the review's page")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for every single measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results: dict[str, Any] = {
        "images": options.images,
        "batch": options.batch,
        "pairs": options.pairs,
        "review pairs": options.review_pairs,
    }
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        results["generation"] = generation(options.images, options.batch, options.repeats, scratch)
        results["second turn"] = second_turn(options.size, options.repeats)
        results["filter"] = filtering(options.pairs, scratch)
        gc.freeze()  # the page's own process holds no models, whose objects the collector would visit
        results["review"] = reviewing(options.review_pairs, options.presses, scratch)
    print(
        f"Demo's model for generation, size {options.size} for the second turn, threads {options.threads}, repeats "
        f"{options.repeats}, torch {torch.__version__}\n"
    )
    print("\n".join(table(results)))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
