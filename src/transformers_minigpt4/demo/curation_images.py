"""Images of the toy world for curation to describe; their keys say what they show."""

import random

from PIL import Image

from .world import draw, training_scenes


def images(count: int, seed: int) -> list[dict[str, Image.Image | str]]:
    """
    Images without texts, as a curation's source `python:transformers_minigpt4.demo.curation_images:images`.

    Held-out combinations are left out, so that what the finished dataset teaches can be measured on them.

    Args:
        count: How many.
        seed: Draws the scenes and the images.

    Returns:
        `list[dict]`: `image` and `key`, such as `0007-large-red-circle-top-left`, which `demo.reviewer` reads.
    """
    rng = random.Random(seed)
    scenes = training_scenes()
    rows: list[dict[str, Image.Image | str]] = []
    for number in range(count):
        scene = rng.choice(scenes)
        words = (scene.size, scene.colour, scene.shape, *scene.place.split())
        rows.append({"image": draw(scene, rng), "key": "-".join((f"{number:04d}", *words))})
    return rows
