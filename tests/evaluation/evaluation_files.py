"""A small task of two kinds of questions, its data files, and tiny checkpoints, for the tests of the evaluation."""

import json
import os
import signal
from pathlib import Path

import torch
from PIL import Image

from transformers_minigpt4.evaluation import run as running
from transformers_minigpt4.evaluation.evaluator import Metric, Question, Task, find_file, mean, ratio, read_json
from transformers_minigpt4.inference.loading import load_engine


class Letters(Task):
    """Counts letters of answers, which needs nothing from a model but some text."""

    name = "letters"
    paper = "MiniGPT-4, Table 4"
    description = "how many letters are e"
    data = "letters.json"
    dataset = "letters"
    split = "val"
    prompts = {"one": "What is this {scene}?"}
    generation = {"max_new_tokens": 4}
    metrics = (
        Metric("accuracy", True, "%", mean("correct", scale=100)),
        Metric("accuracy/even", True, "%", mean("correct", scale=100, where=("kind", "even"))),
        Metric("share", False, "%", ratio("e", "letters", scale=100)),
        Metric("never", True, "%", mean("absent")),
    )
    primary = "accuracy"

    def questions(self, data, limit=None):
        path = find_file(data, "letters.json")
        rows = read_json(path)
        return [
            Question(
                str(row["id"]),
                self.prompts["one"].format(scene=row["scene"]),
                tuple(str(path.parent / name) for name in row["images"]),
                row["reference"],
                {"kind": "even" if row["id"] % 2 == 0 else "odd"},
            )
            for row in rows[:limit]
        ]

    def score(self, questions, answers, judge=None):
        records = []
        for question in questions:
            text = answers.get(question.id)
            records.append(
                {"correct": False, "e": None, "letters": None}
                if text is None
                else {"correct": len(text) % 2 == question.reference, "e": text.count("e"), "letters": len(text)}
            )
        return records


def plain_image(number: int) -> Image.Image:
    return Image.new("RGB", (40 + number % 7, 50), (20 * number % 255, 90, 200 - 17 * number % 200))


def write_letters(folder: Path, rows: int = 10, images: int = 1) -> Path:
    """The data of [`Letters`]: `rows` questions about `images` images each."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for i in range(rows):
        names = [f"{i}-{n}.png" for n in range(images)]
        for n, name in enumerate(names):
            plain_image(3 * i + n).save(folder / name)
        entries.append({"id": i, "scene": "thing " * (1 + i % 4), "images": names, "reference": i % 2})
    (folder / "letters.json").write_text(json.dumps(entries))
    return folder


def killed_in_batch(number: int, checkpoint: str, data: Path, output: Path) -> None:
    """A run that gets SIGKILL while the model works on a batch, counted from 1."""
    torch.set_num_threads(1)
    calls = []

    def load(*arguments, **options):
        engine = load_engine(*arguments, **options)
        generate = engine.model.generate

        def until_then(**inputs):
            calls.append(inputs)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return generate(**inputs)

        engine.model.generate = until_then
        return engine

    running.load_engine = load  # this process dies with it
    running.evaluate(checkpoint, [Letters()], data, output, batch_size=2)


def one_of_two_processes(rank: int, port: int, checkpoint: str, data: Path, output: Path) -> None:
    """A run as `torchrun` starts it; what it returns is written beside the output."""
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    torch.set_num_threads(1)
    results = running.evaluate(checkpoint, [Letters()], data, output, batch_size=2)
    Path(f"{output}-{rank}").write_text(json.dumps(results))
