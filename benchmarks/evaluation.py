"""Measures evaluation: batches against one question at a time, and scoring at the size of the real data.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --questions 16 --answers 1000 --captions 1000   # seconds; only shows that it runs

Answering: all of `evaluate` (reading the questions, loading model and images, answers to the disk, scoring) on the
demo's model with a random projector, over questions in GQA's format about drawn images, with batches of one and larger
ones in turns. Answers must agree. Scoring: the scorers of GQA and CHAIR, with metrics and bootstrap intervals, on
answers made of words that occur in such answers.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from transformers_minigpt4.demo.run import build_model
from transformers_minigpt4.demo.world import COLOURS, SHAPES, all_scenes, draw
from transformers_minigpt4.evaluation.evaluator import Question
from transformers_minigpt4.evaluation.results import complete_records, summarize
from transformers_minigpt4.evaluation.run import evaluate
from transformers_minigpt4.evaluation.tasks import load_task


# A list in the official format, with enough words to be found often; the official one has 80 lines.
SYNONYMS = """person, girl, boy, man, woman, kid, child, people, player
dog, puppy
cat, kitten
car, automobile, van
bicycle, bike
chair, seat, stool
dining table, table, desk
cup, mug
bottle
traffic light, street light
"""
FILLER = (
    *("a", "the", "is", "on", "with", "near", "standing", "next", "two", "small"),
    *("large", "red", "wooden", "in", "front", "of", "and", "behind", "some", "bright"),
)
OBJECTS = (
    *("man", "woman", "dog", "puppy", "cat", "car", "bike", "chair", "table", "mug"),
    *("bottle", "people", "traffic", "street", "light"),
)


def write_gqa(folder: Path, questions: int) -> Path:
    """Drawn images and questions about them in the format of GQA's testdev."""
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    rows = {}
    for number in range(questions):
        scene = rng.choice(all_scenes())
        draw(scene, rng).save(folder / "images" / f"{number}.jpg")
        about, answer = rng.choice((("colour", scene.colour), ("shape", scene.shape)))
        text = f"What {about} is the {rng.choice(('thing', 'object in the picture', 'shape that can be seen here'))}?"
        rows[f"{number:08d}"] = {
            **{"question": text, "imageId": str(number), "answer": answer, "isBalanced": True},
            "types": {"structural": "query", "semantic": "attr"},
        }
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(rows))
    return folder


def answering(questions: int, sizes: list[int], repeats: int) -> dict[int, list[float]]:
    """Seconds of `evaluate` by batch size, after one run that warms up."""
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, processor = build_model()
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        data = write_gqa(folder / "gqa", questions)
        answers = set()
        for repeat in range(-1, repeats):
            for size in sizes if repeat % 2 else sizes[::-1]:
                output = folder / f"{repeat}-{size}"
                start = time.perf_counter()
                evaluate(str(folder / "model"), ["gqa"], data, output, batch_size=size, device="cpu")
                if repeat >= 0:
                    seconds[size].append(time.perf_counter() - start)
                rows = [json.loads(line) for line in (output / "answers" / "gqa.jsonl").read_text().splitlines()]
                answers.add(json.dumps({row["id"]: row["answer"] for row in rows}, sort_keys=True))
    if len(answers) > 1:
        raise SystemExit("batches and single questions gave different answers; the times cannot be compared")
    return seconds


def scoring(name: str, questions: list[Question], answers: dict[str, str]) -> dict[str, float]:
    """Seconds for the records of a task, and for its metrics with intervals."""
    task = load_task(name)
    start = time.perf_counter()
    records = complete_records(task, questions, task.score(questions, answers), answers)
    middle = time.perf_counter()
    summarize(task, questions, records)
    return {"rows": len(questions), "score": middle - start, "intervals": time.perf_counter() - middle}


def gqa_answers(folder: Path, count: int) -> dict[str, float]:
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "0.jpg").touch()  # images are not opened for scoring
    kinds = [(s, m) for s in ("verify", "query", "choose") for m in ("obj", "attr", "rel")]
    words = [*COLOURS, *SHAPES, "yes", "no"]
    rows = {}
    for number in range(count):
        structural, semantic = rng.choice(kinds)
        rows[f"{number:08d}"] = {
            **{"question": "What is it?", "imageId": "0", "answer": rng.choice(words), "isBalanced": True},
            "types": {"structural": structural, "semantic": semantic},
        }
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(rows))
    questions = load_task("gqa").questions(folder)
    formats: tuple[Callable[[str], str], ...] = (str, str.capitalize, "The {}.".format, "It is a {}, I think.".format)
    answers = {question.id: rng.choice(formats)(rng.choice(words)) for question in questions}
    return scoring("gqa", questions, answers)


def chair_captions(folder: Path, count: int) -> dict[str, float]:
    rng = random.Random(0)
    (folder / "val2014").mkdir(parents=True)
    names = [line.split(",")[0] for line in SYNONYMS.splitlines()]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    keys = range(1, count // 2 + 1)  # two questions each
    images = [{"id": key, "file_name": f"COCO_val2014_{key:012d}.jpg"} for key in keys]
    boxes = [{"id": key, "image_id": key, "category_id": rng.randint(1, len(names))} for key in keys]
    captions = [{"id": key, "image_id": key, "caption": f"A {rng.choice(OBJECTS)} on a table."} for key in keys]
    for image in images:
        (folder / "val2014" / image["file_name"]).touch()
    (folder / "synonyms.txt").write_text(SYNONYMS)
    (folder / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": captions}))
    content = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "instances_val2014.json").write_text(json.dumps(content))
    questions = load_task("chair").questions(folder)
    answers = {}
    for question in questions:
        words = 175 if question.groups["length"] == "long" else 29  # as long as the paper's
        text = " ".join(rng.choice(OBJECTS if rng.random() < 0.1 else FILLER) for _ in range(words))
        answers[question.id] = text.capitalize() + "."
    return scoring("chair", questions, answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--captions", type=int, default=40_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="every single measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tqdm.monitor_interval = 0

    seconds = answering(arguments.questions, arguments.batch_sizes, arguments.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        scored = {
            "GQA answers": gqa_answers(Path(scratch) / "gqa", arguments.answers),
            "CHAIR captions": chair_captions(Path(scratch) / "chair", arguments.captions),
        }
    single = statistics.median(seconds[arguments.batch_sizes[0]])
    print(f"{arguments.questions} questions, {arguments.threads} threads, median of {arguments.repeats}\n")
    print(
        f"| batch size | seconds | questions per second | times batch {arguments.batch_sizes[0]} |\n"
        "| ---: | ---: | ---: | ---: |"
    )
    for size, times in seconds.items():
        median = statistics.median(times)
        print(f"| {size} | {median:.2f} | {arguments.questions / median:.1f} | {single / median:.1f} |")
    print("\n| scoring | rows | records (s) | metrics with intervals (s) |\n| --- | ---: | ---: | ---: |")
    for name, row in scored.items():
        print(f"| {name} | {row['rows']:,} | {row['score']:.1f} | {row['intervals']:.1f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"answering": seconds, "scoring": scored}, indent=1) + "\n")


if __name__ == "__main__":
    main()
