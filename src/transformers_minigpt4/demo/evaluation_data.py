"""Writes what the demo's images show in the official file formats that the tasks read."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL.Image import Image as PILImage

from transformers_minigpt4.utils.files import JsonObject, write_json

from .scoring import ASKED
from .texts import QUESTIONS, answer, short_description, web_caption
from .world import COLOURS, COLUMNS, IMAGE_SIZE, ROWS, SHAPES, SIZES, Scene


DATASET = "the demo's toy world"
IMAGES = 173  # one of each combination that no training stage has shown
QUESTIONED = 40  # of these, the images with the questions of Table 4

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


def write_data(folder: Path, scenes: Sequence[Scene], images: Sequence[PILImage], seed: int) -> None:
    """
    Write what the images show in the files that the tasks read.

    COCO's captions (five per image) and instances in `annotations/`, CHAIR's `synonyms.txt`, A-OKVQA's
    `aokvqa_v1p0_val.json`, GQA's `testdev_balanced_questions.json`, and `images/`.

    Args:
        folder: Receives the files; existing ones of these names are replaced.
        scenes: What each image shows.
        images: One per scene.
        seed: Draws words and options.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for number, image in enumerate(images):
        # The official names end in .jpg. At this quality the pixels move by a level or two.
        image.save(folder / "images" / _file_name(number), quality=100, subsampling=0)
    entries = [
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
        folder / "annotations" / "captions_demo.json", {"info": info, "images": entries, "annotations": captions}
    )
    write_json(
        folder / "annotations" / "instances_demo.json",
        {"info": info, "images": entries, "annotations": instances, "categories": categories},
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


def _aokvqa(number: int, scene: Scene, rng: random.Random) -> Iterator[JsonObject]:
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


def _gqa(number: int, scene: Scene) -> Iterator[tuple[str, JsonObject]]:
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
