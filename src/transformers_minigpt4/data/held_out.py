"""Chooses rows that are kept out of training by their content, so the choice is the same wherever they are read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from .images import image_key
from .schema import DataError, Row, RowImage, row_images


LARGEST_SHARE = 0.5


@dataclass(frozen=True)
class Selection:
    """
    Rows that are held out, or all others.

    Whether a row is held out depends on its images alone, or on its text if it has none. So it does not depend on
    the order, the epoch, the number of processes or the seed, all texts about one image are on the same side, and a
    larger share includes a smaller one. A stream of unknown length can be split without reading it first.

    Args:
        share (`float`): Fraction of the images that are held out, above 0 and at most 0.5.
        held_out (`bool`): Whether the held-out rows are selected, or those that remain.

    Raises:
        DataError: for another share.
    """

    share: float
    held_out: bool

    def __post_init__(self) -> None:
        if not 0 < self.share <= LARGEST_SHARE:
            raise DataError(
                f"a share of {self.share} cannot be held out; take a number above 0 and at most {LARGEST_SHARE}, such "
                "as 0.02"
            )

    def selects(self, images: Sequence[RowImage], text: str) -> bool:
        """
        Whether a row is on this side.

        Args:
            images (`Sequence`): PIL images, or `{"bytes", "path"}`, which are read.
            text (`str`): What decides if there is no image.
        """
        contents = [image_key(image) for image in images] or [text.encode("utf-8", "surrogatepass")]
        digest = hashlib.sha256(b"held out" + b"".join(contents)).digest()
        return (int.from_bytes(digest[:8], "big") / 2**64 < self.share) == self.held_out

    def selects_row(self, row: Row) -> bool:
        """Whether a complete row is on this side."""
        return self.selects(row_images(row), str(row.get("completion") or row.get("messages")))
