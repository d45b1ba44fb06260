"""Pictures of the small world for curation to describe; their keys say what they show."""

import random
from typing import Any

from .world import draw, training_things


def pictures(count: int, seed: int) -> list[dict[str, Any]]:
    """
    Pictures without texts, as a curation's source `python:transformers_minigpt4.demo.curation_pictures:pictures`.

    Combinations held out do not occur, so that what the finished set teaches can be measured on them.

    Args:
        count: How many.
        seed: Draws what they show, and how.

    Returns:
        `list[dict]`: `image` and `key`, such as `0007-large-red-circle-top-left`, which `demo.reviewer` reads.
    """
    rng = random.Random(seed)
    things = training_things()
    rows = []
    for number in range(count):
        thing = rng.choice(things)
        words = (thing.size, thing.colour, thing.shape, *thing.place.split())
        rows.append({"image": draw(thing, rng), "key": "-".join((f"{number:04d}", *words))})
    return rows
