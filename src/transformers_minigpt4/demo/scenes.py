"""
Images of the toy world with captions and boxes by construction, for `minigpt4 instruct` to try.

    python -m transformers_minigpt4.demo.scenes my-scenes --count 100
"""

import argparse
import random
from pathlib import Path

from transformers_minigpt4.utils.files import JsonLinesWriter, JsonObject

from .texts import short_description, web_caption
from .world import Scene, draw_with_box, training_scenes


SCENES_FILE, IMAGES = "scenes.jsonl", "images"
_CAPTIONS = 5  # as COCO's images have
_OF_THE_WEB = 2  # of them, which say less


def write_scenes(folder: Path, count: int, seed: int = 0) -> Path:
    """
    Writes images, and a file of their captions and boxes as `minigpt4 instruct init --captions` takes it.

    Held-out combinations are left out, so that what is learned from the data can be measured on them.

    Args:
        folder: New folder for `scenes.jsonl` and `images/`.
        count: How many images.
        seed: Draws the scenes, the images and the captions.

    Returns:
        `Path`: of the file.

    Raises:
        FileExistsError: if the folder has such a file already.
    """
    path = folder / SCENES_FILE
    if path.exists():
        raise FileExistsError(f"{path} already exists; choose another folder")
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    scenes = training_scenes()
    with JsonLinesWriter(path) as file:
        file.append([_record(folder, number, rng.choice(scenes), rng) for number in range(count)])
    return path


def _record(folder: Path, number: int, scene: Scene, rng: random.Random) -> JsonObject:
    image, corners = draw_with_box(scene, rng)
    name = f"{IMAGES}/{number:05d}.png"
    image.save(folder / name)
    captions = [short_description(scene, rng) for _ in range(_CAPTIONS - _OF_THE_WEB)]
    captions += [web_caption(scene, rng) for _ in range(_OF_THE_WEB)]
    box = [round(corner, 4) for corner in corners]
    return {
        "id": f"{number:05d}",
        "image": name,
        "captions": captions,
        "boxes": [{"category": scene.shape, "box": box}],
    }


def main(arguments: list[str] | None = None) -> None:
    """Writes scenes; prints the file's path."""
    parser = argparse.ArgumentParser(prog="python -m transformers_minigpt4.demo.scenes", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        print(write_scenes(options.folder, options.count, options.seed))
    except OSError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
