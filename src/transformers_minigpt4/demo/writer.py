"""
What the stand-in language model writes when it is asked for instruction data: from captions and boxes alone.

    python -m transformers_minigpt4.demo.writer     # serves it as `demo.endpoint` does
"""

import random
import re
from collections.abc import Iterable, Sequence

from transformers_minigpt4.instruct.answers import Turn, render_turns
from transformers_minigpt4.instruct.prompts import COMPLEX, CONVERSATION, DETAIL, messages

from .endpoint import main
from .texts import QUESTIONS, answer, detailed_description
from .world import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Scene


_BOX = re.compile(r"^[a-z ]+: \[([\d., ]+)\]$", re.MULTILINE)
_TURNS = (2, 4)  # of a conversation
# Questions that need the shape's place and size; our own, as the toy world is.
_REASONING = {
    "If the image were cut into nine equal fields, which of them would have to be kept to see the shape?": (
        "The field in the {row} row and the {column} column would have to be kept. The {shape} is in the {place} of "
        "the image, and since it is {size}, nearly all of it is within that field."
    ),
    "Would a second shape of the same size fit next to this one without touching it?": (
        "Yes, it would. The {colour} {shape} is {size} and takes up only the {place} of the image, so that the other "
        "fields around it are free."
    ),
    "Somebody wants to draw attention to the shape. What could be done with the background?": (
        "A background that differs clearly from {colour} would help, because the {shape} is {colour}. As it is {size} "
        "and in the {place} of the image, the rest of the image is free for that."
    ),
}
REASONING = tuple(_REASONING)


def write_answer(texts: Sequence[str]) -> str | None:
    """
    What the stand-in answers to a request for instruction data.

    Args:
        texts: Contents of the request's messages.

    Returns:
        `None` for other requests, and for captions that are not about the toy world.
    """
    kind = next((kind for kind in (CONVERSATION, DETAIL, COMPLEX) if texts[0] == _system(kind)), None)
    if kind is None:
        return None
    # Asked again, the query is followed by an answer and by why it cannot be used.
    query = texts[len(messages(kind, (), ())) - 1]
    scene = read_scene(query)
    if scene is None:
        return None
    rng = random.Random(query)
    if kind == DETAIL:
        return detailed_description(scene, rng)
    if kind == COMPLEX:
        question = rng.choice(REASONING)
        return render_turns([Turn(question, reason(question, scene))])
    questions = rng.sample(QUESTIONS, rng.randint(*_TURNS))
    return render_turns(Turn(question, answer(question, scene, rng)) for question in questions)


def reason(question: str, scene: Scene) -> str:
    """The answer to one of `REASONING`."""
    words = {"colour": scene.colour, "shape": scene.shape, "size": scene.size}
    return _REASONING[question].format(**words, place=scene.place, row=scene.row, column=scene.column)


def read_scene(query: str) -> Scene | None:
    """The scene that captions, and a box if there is one, speak of; `None` if they do not say all of it."""
    words = re.findall(r"[a-z]+", query.lower())
    colour, shape, size = (_first(words, known) for known in (COLOURS, SHAPES, SIZES))
    if box := _BOX.search(query):
        x1, y1, x2, y2 = map(float, box[1].split(","))
        column, row = (
            list(names)[min(2, int(3 * middle))] for names, middle in ((COLUMNS, (x1 + x2) / 2), (ROWS, (y1 + y2) / 2))
        )
    else:
        column, row = _first(words, COLUMNS), _first(words, ROWS) or "middle"
    if not (colour and shape and size and row and column):
        return None
    return Scene(colour, shape, size, row, column)


def _first(words: Iterable[str], known: Iterable[str]) -> str:
    names = set(known)
    return next((word for word in words if word in names), "")


def _system(kind: str) -> str:
    return messages(kind, (), ())[0]["content"]


if __name__ == "__main__":
    main(write=write_answer)
