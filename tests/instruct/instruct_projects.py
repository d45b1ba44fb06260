"""COCO's files in miniature, an endpoint that writes instruction data, and projects on both."""

import json
import re
from pathlib import Path

from PIL import Image
from scripted_endpoint import Reply, ScriptedEndpoint, user_text

from transformers_minigpt4.instruct.config import InstructConfig
from transformers_minigpt4.instruct.prompts import COMPLEX, CONVERSATION, DETAIL, PROMPTS
from transformers_minigpt4.instruct.store import InstructProject
from transformers_minigpt4.llm.types import ChatSettings


THINGS = ("bench", "river", "tower", "garden", "market", "harbor", "bridge", "kitchen", "meadow", "station", "library")
LOOKS = ("quiet", "crowded", "bright", "narrow", "wet", "empty", "old")
DOES = ("reads a book", "feeds two ducks", "waits for the bus", "paints a wall", "eats an apple")


def write_coco(folder: Path, images: int = 12, without_boxes: int = 0) -> tuple[Path, Path, Path]:
    """Files of captions and instances and a folder of images; the last ones have no boxes."""
    names = [f"{number:012d}.jpg" for number in range(1, images + 1)]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (64, 48), (200, 40, 40)).save(folder / "pictures" / name)
    listed = [{"id": n, "file_name": name, "width": 640, "height": 480} for n, name in enumerate(names, start=1)]
    captions = [
        {"id": 10 * n + place, "image_id": n, "caption": f"Scene {n}: {word} view.\n"}
        for n in range(1, images + 1)
        for place, word in enumerate(("first", "second", "third", "fourth", "fifth", "sixth"))
    ]
    boxes = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": [64, -10, 320, 250], "segmentation": [[1.5] * 60]}
        for n in range(1, images + 1 - without_boxes)
    ]
    paths = folder / "captions_tiny.json", folder / "instances_tiny.json"
    paths[0].write_text(json.dumps({"info": {"year": 1}, "images": listed, "licenses": [], "annotations": captions}))
    categories = [{"id": 1, "name": "fire hydrant", "supercategory": "outdoor"}]
    paths[1].write_text(json.dumps({"annotations": boxes, "images": listed, "categories": categories}))
    return *paths, folder / "pictures"


def kind_of(body: dict) -> str:
    """The kind that a request asks for, by its system message."""
    system = body["messages"][0]["content"]
    return next(
        kind
        for kind in (CONVERSATION, DETAIL, COMPLEX)
        if system == (PROMPTS / kind / "system_message.txt").read_bytes().decode()
    )


def scene_of(body: dict) -> int:
    """The number of the scene that a request is about, whether it is the first one or asks again."""
    queries = [message["content"] for message in body["messages"] if message["role"] == "user"]
    return int(re.match(r"Scene (\d+)", next(q for q in reversed(queries) if q.startswith("Scene")))[1])


def is_again(body: dict) -> bool:
    return user_text(body).startswith("This cannot be used")


def good_answer(body: dict) -> str:
    """What a model that follows its instructions would write; different for every scene and kind."""
    n, kind = scene_of(body), kind_of(body)
    place, look, deed = THINGS[n % len(THINGS)], LOOKS[n % len(LOOKS)], DOES[n % len(DOES)]
    said = f"A person {deed} near the {place}, which looks {look}, and {n} birds fly above the red roofs of the town."
    if kind == DETAIL:
        return f"The image shows a {look} {place}. {said} In front of it, {n} lamps stand along the path."
    answer = f"Question:\nWhat happens near the {place}?\n===\nAnswer:\n{said}"
    if kind == COMPLEX:
        return answer
    return f"{answer}\n===\nQuestion:\nHow many birds are there?\n===\nAnswer:\nThere are {n} birds."


def make_config(folder: Path, base_url: str, images: int = 12, without_boxes: int = 0, **settings) -> InstructConfig:
    """Settings on new files of `write_coco`; those of the model among them."""
    captions, instances, pictures = write_coco(folder, images, without_boxes)
    known = ChatSettings.__dataclass_fields__
    chat = {"max_retries": 0, "timeout": 20.0, **{k: v for k, v in settings.items() if k in known}}
    rest = {k: v for k, v in settings.items() if k not in known}
    return InstructConfig(str(captions), str(instances), str(pictures), ChatSettings("m", base_url, **chat), **rest)


def make_project(folder: Path, endpoint: ScriptedEndpoint, **settings) -> InstructProject:
    folder.mkdir(parents=True, exist_ok=True)
    return InstructProject.create(folder / "project", make_config(folder, endpoint.base_url, **settings))


def spoiled(answers: dict[str, Reply | str]):
    """Answers the first request of some scenes, by `SCENE/kind`, or both by `SCENE/kind/again`, with these."""

    def respond(body: dict) -> Reply | str:
        name = f"{scene_of(body)}/{kind_of(body)}"
        if is_again(body):
            return answers.get(f"{name}/again", good_answer(body))
        return answers.get(name, good_answer(body))

    return respond
