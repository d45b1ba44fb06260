"""The small world: its split, its pictures and its texts."""

import random

import numpy as np
import pytest

from transformers_minigpt4.demo.scoring import named_values, right_attributes
from transformers_minigpt4.demo.texts import (
    QUESTIONS,
    answer,
    detailed_description,
    short_description,
    web_caption,
)
from transformers_minigpt4.demo.world import (
    ATTRIBUTES,
    IMAGE_SIZE,
    Thing,
    all_things,
    draw,
    held_out_things,
    is_held_out,
    training_things,
)


def test_split_is_disjoint_and_whole():
    training, held_out = set(training_things()), set(held_out_things())
    assert not training & held_out
    assert training | held_out == set(all_things())
    assert len(held_out) == 173 and len(training) == 691


def test_split_is_the_same_in_every_process():
    # Fixed members: shipped parts were trained on this split, so it must never move.
    assert is_held_out(Thing("red", "circle", "small", "top", "left"))
    assert not is_held_out(Thing("red", "circle", "small", "top", "center"))
    assert is_held_out(Thing("white", "ring", "large", "middle", "right"))


@pytest.mark.parametrize("attribute", [*ATTRIBUTES, "row", "column"])
def test_every_value_is_on_both_sides(attribute):
    values = {getattr(thing, attribute) for thing in all_things()}
    assert {getattr(thing, attribute) for thing in training_things()} == values
    assert {getattr(thing, attribute) for thing in held_out_things()} == values


def test_drawing_depends_on_thing_and_seed_alone():
    thing = Thing("blue", "star", "large", "bottom", "right")
    first, again, other = (np.asarray(draw(thing, random.Random(seed))) for seed in (3, 3, 4))
    assert first.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).any()


def test_pictures_show_their_colour_at_their_place():
    for thing in random.Random(0).sample(all_things(), 60):
        if thing.shape == "ring":
            continue  # its middle is empty
        pixels = np.asarray(draw(thing, random.Random(1))).astype(int)
        x = {"left": 13, "center": 32, "right": 51}[thing.column]
        y = {"top": 13, "middle": 32, "bottom": 51}[thing.row]
        middle = pixels[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
        corner = pixels[-3:, :3] if (thing.row, thing.column) != ("bottom", "left") else pixels[:3, -3:]
        assert np.abs(middle - corner.mean((0, 1))).max() > 30, thing


def test_larger_things_cover_more():
    def covered(size):
        pixels = np.asarray(draw(Thing("black", "square", size, "middle", "center"), random.Random(2)))
        return (pixels.max(-1) < 60).sum()

    assert covered("large") > 1.8 * covered("small")


def test_descriptions_name_all_attributes_and_captions_only_some():
    rng = random.Random(0)
    for thing in rng.sample(all_things(), 200):
        for text in (detailed_description(thing, rng), short_description(thing, rng)):
            assert all(right_attributes(text, thing).values()), text
        assert len(short_description(thing, rng).split()) < 20
        assert 2 <= detailed_description(thing, rng).count(".") <= 4
        caption = web_caption(thing, rng)
        named = {attribute for attribute, values in named_values(caption).items() if values}
        assert 2 <= len(named) <= 3, caption
        assert caption == caption.lower()
        assert all(getattr(thing, attribute) in named_values(caption)[attribute] for attribute in named)


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_fit_their_questions(question):
    rng = random.Random(0)
    thing = Thing("green", "cross", "small", "top", "right")
    right = right_attributes(answer(question, thing, rng), thing)
    wanted = {"color": "colour", "shape": "shape", "large": "size", "Where": "place", "picture": "colour"}
    assert any(right[attribute] for word, attribute in wanted.items() if word in question)
