"""Evaluates the demo's models on its drawn images with the tasks themselves, in the form of the paper's tables."""

import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from transformers_minigpt4.evaluation.evaluator import Question, Record, Task, write_json
from transformers_minigpt4.evaluation.run import evaluate
from transformers_minigpt4.evaluation.tasks.aokvqa import AOKVQA
from transformers_minigpt4.evaluation.tasks.aokvqa import DIRECT_ANSWER as AOKVQA_DIRECT
from transformers_minigpt4.evaluation.tasks.aokvqa import MULTIPLE_CHOICE as AOKVQA_CHOICE
from transformers_minigpt4.evaluation.tasks.chair import CHAIR
from transformers_minigpt4.evaluation.tasks.coco_coverage import JUDGE_PROMPT as COVERS
from transformers_minigpt4.evaluation.tasks.coco_coverage import CocoCoverage
from transformers_minigpt4.evaluation.tasks.gqa import GQA
from transformers_minigpt4.evaluation.tasks.gqa import PROMPT as GQA_PROMPT
from transformers_minigpt4.evaluation.tasks.stage2_failures import JUDGE_PROMPT as OFF_TOPIC
from transformers_minigpt4.evaluation.tasks.stage2_failures import Stage2Failures
from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.llm.types import ChatAnswer, ChatSettings

from .ablations import VARIANTS, train_variants
from .run import CHECKPOINTS, held_out, quiet_and_single_threaded
from .scoring import ASKED, named_values
from .texts import QUESTIONS, answer, short_description, web_caption
from .world import ATTRIBUTES, COLOURS, COLUMNS, IMAGE_SIZE, ROWS, SHAPES, SIZES, Scene


LABEL = "the demo's figures, not the paper's"
DATASET = "the demo's drawn world"
IMAGES = 173  # one of each combination that no training has shown
QUESTIONED = 40  # of these, the images with the questions of Table 4
STATES = dict(zip(CHECKPOINTS, ("before stage 2", "after stage 2")))
MAX_NEW_TOKENS = 100  # the longest description of the demo's training texts has 43
BATCH = 64

# The demo's shapes are its objects. CHAIR makes words singular by rule, which turns "cross" into "cros".
SYNONYMS = "circle, disc, disk\nsquare, box\ntriangle\nstar\ncross, cros\nring, hoop\n"
# GQA's kinds of questions (structural, semantic) for the demo's.
_GQA_KINDS = {
    "colour": ("query", "attr"),
    "shape": ("query", "obj"),
    "size": ("choose", "attr"),
    "place": ("query", "rel"),
}
_OPTIONS = 4  # of A-OKVQA
_REFERENCES = 10


# --- the world's truth in the official file formats ---------------------------------------------------------------


def write_data(folder: Path, scenes: Sequence[Scene], images: Sequence[Any], seed: int) -> None:
    """
    Write what the images show in the files that the tasks read.

    COCO's captions (five a picture) and instances in `annotations/`, CHAIR's `synonyms.txt`, A-OKVQA's
    `aokvqa_v1p0_val.json`, GQA's `testdev_balanced_questions.json`, and `images/`.

    Args:
        folder: Gets the files; existing ones of these names are replaced.
        things: What each picture shows.
        images: `PIL.Image.Image`, one a thing.
        seed: Draws words and options.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for number, image in enumerate(images):
        # The official names end in .jpg. At this quality the pixels move by a level or two.
        image.save(folder / "images" / _file_name(number), quality=100, subsampling=0)
    images = [
        {"id": number, "file_name": _file_name(number), "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        for number in range(len(scenes))
    ]
    captions = [
        {"id": len(scenes) * place + number, "image_id": number, "caption": caption}
        for number, scene in enumerate(scenes)
        for place, caption in enumerate(_captions(scene, rng))
    ]
    categories = [{"id": number, "name": shape, "supercategory": "shape"} for number, shape in enumerate(SHAPES)]
    instances = [
        {"id": number, "image_id": number, "category_id": SHAPES.index(scene.shape), "bbox": _box(scene), "iscrowd": 0}
        for number, scene in enumerate(scenes)
    ]
    info = {"description": DATASET}
    write_json(
        folder / "annotations" / "captions_demo.json", {"info": info, "images": images, "annotations": captions}
    )
    write_json(
        folder / "annotations" / "instances_demo.json",
        {"info": info, "images": images, "annotations": instances, "categories": categories},
    )
    (folder / "synonyms.txt").write_text(SYNONYMS, encoding="utf-8")
    asked = list(enumerate(scenes[:QUESTIONED]))
    write_json(
        folder / "aokvqa_v1p0_val.json", [row for number, scene in asked for row in _aokvqa(number, scene, rng)]
    )
    write_json(
        folder / "testdev_balanced_questions.json", dict(row for number, scene in asked for row in _gqa(number, scene))
    )


def _file_name(number: int) -> str:
    return f"{number:012}.jpg"


def _captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions as five people might write them: two that name all four attributes, three that name two."""
    what = "What is in the picture?"
    return [
        short_description(scene, rng),
        answer(what, scene, rng),
        short_description(scene, rng),
        answer(what, scene, rng),
        web_caption(scene, rng),
    ]


def _box(scene: Scene) -> list[float]:
    """About where the shape is: x, y, width, height in pixels, as COCO has them."""
    side, radius = IMAGE_SIZE / 3, SIZES[scene.size]
    x, y = ((index + 0.5) * side for index in (COLUMNS.index(scene.column), ROWS.index(scene.row)))
    return [round(x - radius, 1), round(y - radius, 1), 2 * radius, 2 * radius]


# The questions that ask for one attribute, with that attribute.
_ASKED = {question: ASKED[question][0] for question in QUESTIONS if len(ASKED[question]) == 1}


def _aokvqa(number: int, scene: Scene, rng: random.Random) -> Iterator[dict[str, Any]]:
    """One question for each attribute."""
    for place, (attribute, question) in enumerate({attribute: asked for asked, attribute in _ASKED.items()}.items()):
        value = getattr(scene, attribute)
        others = [other for other in _values(attribute) if other != value]
        choices = [value, *rng.sample(others, min(_OPTIONS - 1, len(others)))]
        rng.shuffle(choices)
        yield {
            "split": "val",
            "image_id": number,
            "question_id": f"{number}-{place}",
            "question": question,
            "choices": choices,
            "correct_choice_idx": choices.index(value),
            "direct_answers": [value] * _REFERENCES,
            "difficult_direct_answer": False,
            "rationales": [],
        }


def _gqa(number: int, scene: Scene) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every question for one attribute."""
    for place, (question, attribute) in enumerate(_ASKED.items()):
        structural, semantic = _GQA_KINDS[attribute]
        yield (
            f"{number}{place}",
            {
                "imageId": _file_name(number).removesuffix(".jpg"),
                "question": question,
                "answer": getattr(scene, attribute),
                "isBalanced": True,
                "types": {"structural": structural, "semantic": semantic, "detailed": attribute},
            },
        )


def _values(attribute: str) -> list[str]:
    places = [Scene("red", "star", "small", row, column).place for row in ROWS for column in COLUMNS]
    return {"colour": list(COLOURS), "shape": list(SHAPES), "size": list(SIZES), "place": places}[attribute]


# --- a judge that knows the world ---------------------------------------------------------------------------------


class TruthJudge(ChatModel):
    """
    Answers the judges' questions about the drawn world by rule, in place of a language model.

    A text covers a caption when it names every attribute that the caption names, with the same value and no other. It
    speaks about the picture when it so names three of the four attributes at least, which is the demo's own rule.
    """

    def __init__(self) -> None:
        super().__init__(ChatSettings(model="the demo's rules"))

    def identity(self) -> str:
        return "rules"

    def complete_many(self, requests: Iterable[tuple[Any, list[dict[str, str]]]]) -> Iterator[tuple[Any, ChatAnswer]]:
        for key, messages in requests:
            yes = self._says_yes(messages[-1]["content"])
            yield key, ChatAnswer("yes" if yes else "no", "stop", 0, 0, 0.0)

    def _says_yes(self, prompt: str) -> bool:
        if fields := unfilled(COVERS, prompt):
            truth, named = named_values(fields["caption"]), named_values(fields["answer"])
            return all(named[attribute] == values for attribute, values in truth.items() if values)
        if fields := unfilled(OFF_TOPIC, prompt):
            truth, named = named_values(fields["captions"]), named_values(fields["answer"])
            return sum(named[attribute] == truth[attribute] for attribute in ATTRIBUTES) >= len(ATTRIBUTES) - 1
        raise ValueError(f"the demo's judge knows no such question: {prompt[:80]!r}")


def unfilled(template: str, text: str) -> dict[str, str] | None:
    """What stands in a text at the `{fields}` of the template that it was made from; `None` if from another."""
    match = _pattern(template).fullmatch(text)
    return match.groupdict() if match else None


@lru_cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    pattern = "".join(f"(?P<{part}>.*?)" if place % 2 else re.escape(part) for place, part in enumerate(parts))
    return re.compile(pattern, re.DOTALL)


# --- the tasks on this world --------------------------------------------------------------------------------------


def _in_the_demo(table: int) -> dict[str, Any]:
    """What the demo's tasks are called, so that nobody takes their figures for the paper's."""
    paper = f"the demo's drawn world, in the manner of MiniGPT-4, Table {table}"
    return {"paper": paper, "dataset": DATASET, "split": "held out", "generation": {"max_new_tokens": MAX_NEW_TOKENS}}


class _DescriptionsAlone(Stage2Failures):
    """Leaves the poem out, which the demo's language model has never learned to write."""

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        return [question for question in super().questions(data) if question.groups["prompt"] == "detail"][:limit]


class _PlainQuestions(Task):
    """
    Asks the bare question, which is all that the demo's language model has learned, and reads its sentences.

    "It is red." answers the question for the colour with "red": each answer counts as the one value that it names. One
    that names none or several stays as it is, and is wrong.
    """

    templates: tuple[str, ...]

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        return [replace(question, prompt=self._bare(question.prompt)) for question in super().questions(data, limit)]  # type: ignore[safe-super]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        read = {q.id: _value(q.prompt, answers[q.id]) for q in questions if q.id in answers}
        return super().score(questions, read, judge)  # type: ignore[safe-super]

    def _bare(self, prompt: str) -> str:
        for template in self.templates:
            if fields := unfilled(template, prompt):
                return fields["question"]
        raise ValueError(f"the task {self.name} has other prompts than the demo knows: {prompt[:80]!r}")


def _value(question: str, text: str) -> str:
    values = named_values(text)[ASKED[question][0]]
    return next(iter(values)) if len(values) == 1 else text


def demo_tasks() -> list[Task]:
    """The tasks of the paper's Tables 2 to 5 with the demo's names, limits of length and questions."""

    def made(kind: type[Task], table: int, **attributes: Any) -> Task:
        return type(kind.__name__, (kind,), {**_in_the_demo(table), **attributes})()

    plain = {"question": "{question}"}
    return [
        made(CocoCoverage, 2),
        made(_DescriptionsAlone, 3, prompts={"detail": Stage2Failures.prompts["detail"]}),
        made(
            type("AOKVQA", (_PlainQuestions, AOKVQA), {"templates": (AOKVQA_CHOICE, AOKVQA_DIRECT)}), 4, prompts=plain
        ),
        made(type("GQA", (_PlainQuestions, GQA), {"templates": (GQA_PROMPT,)}), 4, prompts=plain),
        made(CHAIR, 5),
    ]


# --- the run ------------------------------------------------------------------------------------------------------


def evaluate_demo(
    output: str | os.PathLike,
    seed: int = 0,
    *,
    images: int = IMAGES,
    checkpoints: Mapping[str, Mapping[str, Path]] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """
    Evaluate the standard model and the paper's variants on the drawn world, before and after stage 2.

    The tasks of the paper's Tables 2 to 5 run as on real data: the world's truth is written in the official file
    formats, the models are loaded from their folders, and a judge that knows the world takes a language model's place.
    A second call trains and asks nothing again.

    Args:
        output: Gets `checkpoints/`, `data/`, a folder of results for each model in `results/VARIANT/STATE`, and
            `demo.json`.
        seed: Draws the world, and the training.
        images: Pictures to ask about, at most 173; the first 40 with the questions of Table 4.
        checkpoints: Trained ones by variant (of `demo.ablations.VARIANTS`) and state (`stage1`, `checkpoint`); by
            default all four variants are trained, which takes minutes.
        console: Where progress and tables go; standard output by default.

    Returns:
        What `demo.json` holds: `label`, `seed`, `images`, and by variant and state the metrics of each task.

    Raises:
        ValueError: for a number of images that cannot be, or an `output` with results of other checkpoints.
    """
    if not 1 <= images <= IMAGES:
        raise ValueError(f"images is {images}, but {IMAGES} combinations are held out; choose 1 to {IMAGES}")
    output, console = Path(output), console or Console()
    trained = checkpoints if checkpoints is not None else train_variants(output / "checkpoints", seed, console=console)
    write_data(output / "data", *held_out(seed, images), seed)
    rows: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
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
    summary = {"label": LABEL, "seed": seed, "images": images, "models": rows}
    write_json(output / "demo.json", summary)
    for table in demo_tables(rows, images):
        console.print(table)
    console.print(f"answers, records and intervals of each model in {output / 'results'}", soft_wrap=True)
    return summary


Rows = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]


def demo_tables(rows: Rows, images: int) -> list[Table]:
    """
    The demo's figures in the form of the paper's Tables 2 to 5.

    Args:
        rows: By variant and state the metrics of each task.
        images: How many were asked about.
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
