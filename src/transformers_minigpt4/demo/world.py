"""Images of the toy world: one coloured shape each, drawn from four attributes and a random seed."""

import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw


COLOURS = {
    "red": (214, 32, 36),
    "orange": (245, 130, 24),
    "yellow": (246, 220, 40),
    "green": (36, 150, 60),
    "blue": (36, 80, 210),
    "purple": (128, 40, 160),
    "black": (18, 18, 20),
    "white": (252, 252, 252),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 7.0, "large": 11.0}  # radius in pixels of the finished image
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")

IMAGE_SIZE = 64
ATTRIBUTES = ("colour", "shape", "size", "place")

# Plain light and middle tones, none of which is near a shape's colour.
_BACKGROUNDS = ((176, 190, 200), (200, 184, 172), (168, 196, 172), (196, 176, 200), (150, 160, 170), (188, 188, 188))
_CELL_CENTRES = (13.0, 32.0, 51.0)
_OVERSAMPLING = 4  # drawn this much larger, then reduced: smooth edges
_HELD_OUT_OF = 5


@dataclass(frozen=True)
class Scene:
    """What one image shows: the four attributes, place being a row and a column of a 3 x 3 grid."""

    colour: str
    shape: str
    size: str
    row: str
    column: str

    @property
    def place(self) -> str:
        """The place in words: `"top left"`, ..., and `"center"` for the middle of the grid."""
        return "center" if (self.row, self.column) == ("middle", "center") else f"{self.row} {self.column}"

    @property
    def words(self) -> tuple[str, str, str, str, str]:
        """The five words that name everything: colour, shape, size, row, column."""
        return self.colour, self.shape, self.size, self.row, self.column


def all_scenes() -> list[Scene]:
    """All 864 combinations, in a fixed order."""
    return [Scene(*words) for words in itertools.product(COLOURS, SHAPES, SIZES, ROWS, COLUMNS)]


def is_held_out(scene: Scene) -> bool:
    """
    Whether a combination is held out of all training: of the tower, of the language model and of the projector.

    A sum of the attributes' indices modulo 5, so that each value and each pair of values occurs on both sides.
    """
    place = 3 * ROWS.index(scene.row) + COLUMNS.index(scene.column)
    total = list(COLOURS).index(scene.colour) + 2 * SHAPES.index(scene.shape) + 3 * list(SIZES).index(scene.size)
    return (total + place) % _HELD_OUT_OF == 0


def training_scenes() -> list[Scene]:
    """The combinations that training may show, about 80 %."""
    return [scene for scene in all_scenes() if not is_held_out(scene)]


def held_out_scenes() -> list[Scene]:
    """The combinations that only evaluation shows, about 20 %."""
    return [scene for scene in all_scenes() if is_held_out(scene)]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """
    Draws one image; everything but the four attributes varies with `rng`.

    Args:
        scene: What to show.
        rng: Draws background, tint, position within the cell, tilt and noise.

    Returns:
        `PIL.Image.Image`: RGB, 64 x 64 pixels.
    """
    return draw_with_box(scene, rng)[0]


def draw_with_box(scene: Scene, rng: random.Random) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """As [`draw`], with the shape's box: x1, y1, x2, y2 as shares of the image, from its center and radius."""
    side = IMAGE_SIZE * _OVERSAMPLING
    image = Image.new("RGB", (side, side), _tinted(rng.choice(_BACKGROUNDS), rng, 14))
    radius = SIZES[scene.size] * rng.uniform(0.93, 1.07) * _OVERSAMPLING
    x = (_CELL_CENTRES[COLUMNS.index(scene.column)] + rng.uniform(-2.0, 2.0)) * _OVERSAMPLING
    y = (_CELL_CENTRES[ROWS.index(scene.row)] + rng.uniform(-2.0, 2.0)) * _OVERSAMPLING
    _draw_shape(ImageDraw.Draw(image), scene, (x, y), radius, _tinted(COLOURS[scene.colour], rng, 10), rng)
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0.0, rng.uniform(0.0, 6.0), (IMAGE_SIZE, IMAGE_SIZE, 3))
    drawn = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    x1, y1, x2, y2 = (corner / side for corner in (x - radius, y - radius, x + radius, y + radius))
    return drawn, (x1, y1, x2, y2)


def _tinted(colour: tuple[int, int, int], rng: random.Random, spread: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in colour)
    return red, green, blue


def _draw_shape(
    pen: ImageDraw.ImageDraw,
    scene: Scene,
    center: tuple[float, float],
    radius: float,
    colour: tuple[int, int, int],
    rng: random.Random,
) -> None:
    x, y = center
    tilt = math.radians(rng.uniform(-8.0, 8.0))

    def polygon(points: list[tuple[float, float]]) -> None:
        """Points in units of the radius around the center, y downwards."""
        cos, sin = math.cos(tilt), math.sin(tilt)
        pen.polygon([(x + radius * (a * cos - b * sin), y + radius * (a * sin + b * cos)) for a, b in points], colour)

    box = (x - radius, y - radius, x + radius, y + radius)
    if scene.shape == "circle":
        pen.ellipse(box, colour)
    elif scene.shape == "ring":
        pen.ellipse(box, outline=colour, width=round(0.34 * radius))
    elif scene.shape == "square":
        polygon([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])
    elif scene.shape == "triangle":
        polygon([(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)])
    elif scene.shape == "star":
        corners = [(math.pi * (i / 5 - 0.5), 1.1 if i % 2 == 0 else 0.45) for i in range(10)]
        polygon([(length * math.cos(angle), length * math.sin(angle)) for angle, length in corners])
    else:  # cross
        arm = 0.32
        polygon([(-arm, -1), (arm, -1), (arm, 1), (-arm, 1)])
        polygon([(-1, -arm), (1, -arm), (1, arm), (-1, arm)])
