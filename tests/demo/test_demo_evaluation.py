"""The evaluation of the demo's models: the scenes in official file formats, the judge, a small run of all tasks."""

import io
import json
import random

import pytest
from rich.console import Console

from transformers_minigpt4.demo.evaluation import LABEL, evaluate_demo
from transformers_minigpt4.demo.evaluation_data import write_data
from transformers_minigpt4.demo.evaluation_tasks import TruthJudge, demo_tasks, unfilled
from transformers_minigpt4.demo.run import held_out
from transformers_minigpt4.demo.world import Scene
from transformers_minigpt4.evaluation.tasks.coco_coverage import JUDGE_PROMPT as COVERS
from transformers_minigpt4.evaluation.tasks.stage2_failures import JUDGE_PROMPT as OFF_TOPIC


STAR = Scene("red", "star", "large", "top", "left")
CROSS = Scene("orange", "cross", "small", "middle", "center")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, *held_out(0, 12), seed=0)
    return folder


@pytest.fixture(scope="module")
def questions(data):
    return {task.name: (task, task.questions(data)) for task in demo_tasks()}


def test_the_truth_is_read_by_the_tasks_themselves(questions):
    counts = {name: len(found) for name, (_, found) in questions.items()}
    # 12 images: a description; 4 questions by choice and freely; 7 questions; a long and a short description.
    assert counts == {"coco_coverage": 12, "stage2_failures": 12, "aokvqa": 96, "gqa": 84, "chair": 24}
    scenes, _ = held_out(0, 12)
    for question, scene in zip(questions["coco_coverage"][1], scenes):
        assert len(question.reference["captions"]) == 5
        assert f"{scene.colour} {scene.shape}" in " ".join(question.reference["captions"])
    objects = [question.reference["objects"] for question in questions["chair"][1][::2]]
    assert objects == [[scene.shape] for scene in scenes]
    prompts = {question.prompt for question in questions["gqa"][1]}
    assert "What color is it?" in prompts and all("\n" not in prompt for prompt in prompts)


def test_perfect_and_wrong_answers(questions):
    """What a model that sees all, and one that sees a red star everywhere, would score."""
    scenes, _ = held_out(0, 12)
    for name, right, wrong in (
        ("aokvqa", "It is {}.", "It is a red star that is large, in the top left."),
        ("gqa", "It is {}.", "I do not know."),
    ):
        task, asked = questions[name]
        gold = {}
        for question in asked:
            reference = question.reference
            gold[question.id] = (
                reference["answer"]
                if "answer" in reference
                else reference["answers"][0]
                if "answers" in reference
                else reference["choices"][reference["correct"]]
            )
        column = "choice_correct" if name == "aokvqa" else "correct"
        records = task.score(asked, {key: right.format(value) for key, value in gold.items()}, None)
        assert {record.get(column, record.get("direct_score")) for record in records} == {1}
        records = task.score(asked, dict.fromkeys(gold, wrong), None)
        scores = [record[column] for record in records if column in record]
        assert sum(scores) / len(scores) < 0.5
    task, asked = questions["chair"]
    answers = {q.id: f"A {scenes[i // 2].shape} beside a cross." for i, q in enumerate(asked)}
    records = task.score(asked, answers, None)
    assert [record["hallucinated"] for record in records[::2]] == [int(scene.shape != "cross") for scene in scenes]


@pytest.mark.parametrize(
    "caption,text,covered",
    [
        ("red star icon", "The picture shows a large red star.", True),
        ("red star icon", "The picture shows a large blue star.", False),
        ("red star icon", "There is a star.", False),
        ("A large red star in the top left of the image.", "A red star that is large. It is in the top left.", True),
        ("A large red star in the top left of the image.", "A red star that is large.", False),
        ("red star icon", "A red and blue star.", False),
    ],
)
def test_the_judge_knows_what_covers(caption, text, covered):
    prompt = COVERS.format(caption=caption, answer=text)
    with TruthJudge() as judge:
        assert judge.complete([{"role": "user", "content": prompt}]).text == ("yes" if covered else "no")


@pytest.mark.parametrize(
    "text,speaks",
    [
        ("A large red star. It lies in the top left.", True),
        ("A large red star. It lies in the bottom left.", True),
        ("A large blue star. It lies in the bottom left.", False),
        ("Nothing else can be seen.", False),
    ],
)
def test_the_judge_knows_what_is_off_topic(text, speaks):
    captions = "- red star\n- A large red star in the top left of the image."
    prompt = OFF_TOPIC.format(captions=captions, prompt="Describe the image in detail.", answer=text)
    with TruthJudge() as judge:
        assert judge.complete([{"role": "user", "content": prompt}]).text == ("yes" if speaks else "no")
        with pytest.raises(ValueError, match="does not know this question"):
            judge.complete([{"role": "user", "content": "Is it nice?"}])


def test_unfilled():
    assert unfilled("a {x} b {y}", "a 1\n2 b {z}") == {"x": "1\n2", "y": "{z}"}
    assert unfilled("a {x}", "b 1") is None


def test_data_is_the_same_each_time(data, tmp_path):
    write_data(tmp_path, *held_out(0, 12), seed=0)
    for path in data.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(data)).read_bytes(), path


def test_boxes_hold_the_shape(data):
    """About: the shape is where the box is, and nowhere else."""
    from PIL import Image, ImageFilter

    instances = json.loads((data / "annotations" / "instances_demo.json").read_text())
    for row in random.Random(0).sample(instances["annotations"], 6):
        image = Image.open(data / "images" / instances["images"][row["image_id"]]["file_name"])
        smooth = image.filter(ImageFilter.MedianFilter(5))
        x, y, width, height = row["bbox"]
        background, inside = smooth.getpixel((63, 63) if x < 30 else (0, 63)), []
        for dx in range(0, int(width), 2):
            for dy in range(0, int(height), 2):
                inside.append(smooth.getpixel((min(63, max(0, int(x + dx))), min(63, max(0, int(y + dy))))))
        assert max(sum(abs(a - b) for a, b in zip(pixel, background)) for pixel in inside) > 60


@pytest.fixture(scope="module")
def finished(demo_run, tmp_path_factory):
    """The demo's own two checkpoints on 12 images."""
    output = tmp_path_factory.mktemp("evaluation")
    screen = io.StringIO()
    checkpoints = {"standard": {name: demo_run / name for name in ("stage1", "checkpoint")}}
    console = Console(file=screen, width=120)
    summary = evaluate_demo(output, images=12, checkpoints=checkpoints, console=console)
    return output, summary, screen.getvalue()


def test_all_tasks_ran_on_both_states(finished):
    output, summary, _ = finished
    assert json.loads((output / "demo.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["label"] == LABEL and "demo" in LABEL
    for state in ("stage1", "checkpoint"):
        written = json.loads((output / "results" / "standard" / state / "results.json").read_text())
        assert set(written["tasks"]) == {"coco_coverage", "stage2_failures", "aokvqa", "gqa", "chair"}
        assert all("demo" in entry["paper"] and "demo" in entry["dataset"] for entry in written["tasks"].values())
        assert all(entry["failures"] == 0 for entry in written["tasks"].values())
        assert len((output / "results" / "standard" / state / "answers" / "gqa.jsonl").read_text().splitlines()) == 84


def test_stage_2_helps_in_every_table(finished):
    before, after = finished[1]["models"]["standard"].values()
    assert after["coco_coverage"]["captions_covered"] > before["coco_coverage"]["captions_covered"] + 1
    assert after["stage2_failures"]["failure"] < before["stage2_failures"]["failure"]
    assert after["aokvqa"]["multiple_choice"] > 85 > before["aokvqa"]["multiple_choice"]
    assert after["gqa"]["accuracy"] > 85 > before["gqa"]["accuracy"]
    assert after["chair"]["words/short"] < 15 < after["chair"]["words/long"]


def test_four_tables_in_the_papers_form(finished):
    screen = finished[2]
    for number in (2, 3, 4, 5):
        assert f"in the manner of Table {number}" in screen
    assert screen.count(LABEL) == 4
    for text in ("MiniGPT-4", "before", "after", "A-OKVQA", "CHAIR_i long", "off-topic"):
        assert text in screen


@pytest.mark.parametrize("images", [0, 174])
def test_impossible_number_of_images(tmp_path, images):
    with pytest.raises(ValueError, match="173 combinations are held out"):
        evaluate_demo(tmp_path, images=images, checkpoints={})
