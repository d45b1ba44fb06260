"""Draws the demo's contact sheet: images with the texts that the model wrote about them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


_SCALE = 3  # images are enlarged by this factor, without smoothing
_MARGIN = 12
_LINE = 17
_CHARACTERS = 72  # of one line of text
_TEXT_WIDTH = 460
_INK = (25, 25, 25)
_MUTED = (120, 120, 120)


def save_contact_sheet(
    path: Path, images: Sequence[Image.Image], texts: Sequence[Sequence[tuple[str, str]]], columns: int = 2
) -> None:
    """
    Writes a PNG with one cell per image, its labeled texts next to it.

    Args:
        path: The PNG to write.
        images: Images of one size.
        texts: For each image its (label, text) pairs, from top to bottom.
        columns: Cells in a row.

    Raises:
        ValueError: when there is no image, or not one list of texts per image.
    """
    if not images or len(images) != len(texts):
        raise ValueError(f"Got {len(images)} images and {len(texts)} lists of texts. Give one list per image.")
    font = ImageFont.load_default(13)
    cells = [[(label, textwrap.wrap(text, _CHARACTERS) or ["(nothing)"]) for label, text in cell] for cell in texts]
    width, height = (side * _SCALE for side in images[0].size)
    lines = max(sum(1 + len(wrapped) for _, wrapped in cell) for cell in cells)
    cell_height = max(height, lines * _LINE) + 2 * _MARGIN
    cell_width = width + _TEXT_WIDTH + 3 * _MARGIN
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, cell) in enumerate(zip(images, cells)):
        left, top = (i % columns) * cell_width + _MARGIN, (i // columns) * cell_height + _MARGIN
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        y = top
        for label, wrapped in cell:
            pen.text((left + width + _MARGIN, y), label, fill=_MUTED, font=font)
            for line in wrapped:
                y += _LINE
                pen.text((left + width + _MARGIN, y), line, fill=_INK, font=font)
            y += _LINE
    sheet.save(path)
