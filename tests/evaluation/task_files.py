"""Data of every task in its official format, as small as can be, for the tests."""

import json
from pathlib import Path

from judged_files import write_advanced, write_coco, write_image, write_lines


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_aokvqa(folder: Path) -> None:
    write_image(folder / "val2017" / "000000000007.jpg")
    row = {
        **{"split": "val", "image_id": 7, "question_id": "a", "question": "What is on the man's head?"},
        **{"choices": ["hat", "cap", "bird", "nothing"], "correct_choice_idx": 1, "direct_answers": ["cap"] * 10},
        "difficult_direct_answer": False,
    }
    write_json(folder / "aokvqa_v1p0_val.json", [row])


def write_gqa(folder: Path) -> None:
    write_image(folder / "images" / "n1.jpg")
    types = {"structural": "query", "semantic": "attr"}
    row = {
        "question": "What color is the dog?",
        "imageId": "n1",
        "answer": "brown",
        "isBalanced": True,
        "types": types,
    }
    write_json(folder / "testdev_balanced_questions.json", {"201": row})


def write_chair(folder: Path) -> None:
    write_coco(folder, {1: ["A dog."], 2: ["A cat."]})
    captions = json.loads((folder / "annotations" / "captions_val2014.json").read_text())
    boxes = [{"id": 1, "image_id": 1, "category_id": 18}, {"id": 2, "image_id": 2, "category_id": 17}]
    categories = [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}]
    instances = {"images": captions["images"], "annotations": boxes, "categories": categories}
    write_json(folder / "annotations" / "instances_val2014.json", instances)
    (folder / "synonyms.txt").write_text("dog, puppy\ncat, kitten\n")


def write_scienceqa(folder: Path) -> None:
    with_image = {
        **{
            "question": "Which  ocean is highlighted?",
            "choices": ["the Arctic Ocean", "the Indian Ocean"],
            "answer": 0,
        },
        **{"hint": "", "image": "image.png", "subject": "social science", "grade": "grade3", "split": "test"},
    }
    text_alone = {
        **{"question": "Which word rhymes?", "choices": ["thin", "tall", "bin"], "answer": 2},
        **{"hint": "Read the  poem.", "image": None, "subject": "language science", "grade": "grade11"},
    }
    write_json(folder / "problems.json", {"4": with_image, "11": text_alone})
    write_json(folder / "pid_splits.json", {"train": ["11", "4"], "test": ["4", "11"]})
    write_image(folder / "test" / "4" / "image.png")


def write_llava_bench(folder: Path) -> None:
    question = {"question_id": 0, "image": "000000000139.jpg", "text": "What is the man doing?", "category": "conv"}
    write_lines(folder / "qa90_questions.jsonl", [question])
    write_lines(folder / "qa90_gpt4_answer.jsonl", [{"question_id": 0, "text": "He reads."}])
    boxes = [{"category": "person", "bbox": [0.1, 0.2, 0.3, 0.4]}]
    context = {"image": "000000000139.jpg", "captions": ["A man reads."], "instances": boxes}
    write_lines(folder / "caps_boxes_coco2014_val_80.jsonl", [context])
    write_image(folder / "images" / "000000000139.jpg")


def write_pope(folder: Path) -> None:
    for sampling in ("random", "popular", "adversarial"):
        row = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "no"}
        write_lines(folder / f"coco_pope_{sampling}.json", [row])
    write_image(folder / "images" / "a.jpg")


def write_captioned(folder: Path) -> None:
    write_coco(folder, {1: ["A dog."], 2: ["A cat."]})


DATA = {
    "advanced": lambda folder: write_advanced(folder, images=1),
    "coco_coverage": write_captioned,
    "stage2_failures": write_captioned,
    "aokvqa": write_aokvqa,
    "gqa": write_gqa,
    "chair": write_chair,
    "scienceqa": write_scienceqa,
    "scienceqa_short": write_scienceqa,
    "llava_bench": write_llava_bench,
    "pope": write_pope,
    "captions": write_captioned,
}
