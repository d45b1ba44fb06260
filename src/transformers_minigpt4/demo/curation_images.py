"""Pictures of the small world for curation to describe; their keys say what they show."""

import random
from typing import Any

from .world import draw, training_scenes


def images(count: int, seed: int) -> list[dict[str, Any]]:
    """
    Pictures without texts, as a curation's source `python:transformers_minigpt4.demo.curation_images:images`.

    Combinations held out do not occur, so that what the finished set teaches can be measured on them.

    Args:
        count: How many.
        seed: Draws what they show, and how.

    Returns:
        `list[dict]`: `image` and `key`, such as `0007-large-red-circle-top-left`, which `demo.reviewer` reads.
    """
    rng = random.Random(seed)
    scenes = training_scenes()
    rows = []
    for number in range(count):
        scene = rng.choice(scenes)
        words = (scene.size, scene.colour, scene.shape, *scene.place.split())
        rows.append({"image": draw(scene, rng), "key": "-".join((f"{number:04d}", *words))})
    return rows
