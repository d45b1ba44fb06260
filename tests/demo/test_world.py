"""The toy world: its split, its images and its texts."""

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
    Scene,
    all_scenes,
    draw,
    held_out_scenes,
    is_held_out,
    training_scenes,
)


def test_split_is_disjoint_and_whole():
    training, held_out = set(training_scenes()), set(held_out_scenes())
    assert not training & held_out
    assert training | held_out == set(all_scenes())
    assert len(held_out) == 173 and len(training) == 691


def test_split_is_the_same_in_every_process():
    # Fixed members: shipped parts were trained on this split, so it must never move.
    assert is_held_out(Scene("red", "circle", "small", "top", "left"))
    assert not is_held_out(Scene("red", "circle", "small", "top", "center"))
    assert is_held_out(Scene("white", "ring", "large", "middle", "right"))


@pytest.mark.parametrize("attribute", [*ATTRIBUTES, "row", "column"])
def test_every_value_is_on_both_sides(attribute):
    values = {getattr(scene, attribute) for scene in all_scenes()}
    assert {getattr(scene, attribute) for scene in training_scenes()} == values
    assert {getattr(scene, attribute) for scene in held_out_scenes()} == values


def test_drawing_depends_only_on_scene_and_seed():
    scene = Scene("blue", "star", "large", "bottom", "right")
    first, again, other = (np.asarray(draw(scene, random.Random(seed))) for seed in (3, 3, 4))
    assert first.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).any()


def test_images_show_their_colour_at_their_place():
    for scene in random.Random(0).sample(all_scenes(), 60):
        if scene.shape == "ring":
            continue  # its middle is empty
        pixels = np.asarray(draw(scene, random.Random(1))).astype(int)
        x = {"left": 13, "center": 32, "right": 51}[scene.column]
        y = {"top": 13, "middle": 32, "bottom": 51}[scene.row]
        middle = pixels[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
        corner = pixels[-3:, :3] if (scene.row, scene.column) != ("bottom", "left") else pixels[:3, -3:]
        assert np.abs(middle - corner.mean((0, 1))).max() > 30, scene


def test_larger_shapes_cover_more():
    def covered(size):
        pixels = np.asarray(draw(Scene("black", "square", size, "middle", "center"), random.Random(2)))
        return (pixels.max(-1) < 60).sum()

    assert covered("large") > 1.8 * covered("small")


def test_descriptions_name_all_attributes_and_captions_only_some():
    rng = random.Random(0)
    for scene in rng.sample(all_scenes(), 200):
        for text in (detailed_description(scene, rng), short_description(scene, rng)):
            assert all(right_attributes(text, scene).values()), text
        assert len(short_description(scene, rng).split()) < 20
        assert 2 <= detailed_description(scene, rng).count(".") <= 4
        caption = web_caption(scene, rng)
        named = {attribute for attribute, values in named_values(caption).items() if values}
        assert 2 <= len(named) <= 3, caption
        assert caption == caption.lower()
        assert all(getattr(scene, attribute) in named_values(caption)[attribute] for attribute in named)


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_fit_their_questions(question):
    rng = random.Random(0)
    scene = Scene("green", "cross", "small", "top", "right")
    right = right_attributes(answer(question, scene, rng), scene)
    wanted = {"color": "colour", "shape": "shape", "large": "size", "Where": "place", "picture": "colour"}
    assert any(right[attribute] for word, attribute in wanted.items() if word in question)
