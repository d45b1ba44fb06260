"""Loads the rows that a run is evaluated on, and those whose answers show what it has learned."""

import logging
import os
from collections.abc import Container
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

from datasets import Dataset

from transformers_minigpt4.data.held_out import Selection
from transformers_minigpt4.data.images import image_bytes, image_key
from transformers_minigpt4.data.prompt_formats import INSTRUCTIONS, render
from transformers_minigpt4.data.schema import DataError, Row, UndecodedImage, row_images
from transformers_minigpt4.data.sources import open_rows, parse_source
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image

from .arguments import StageArguments, StageConfig


logger = logging.getLogger(__name__)
SAMPLES = 4  # held-out rows whose answers are kept, if the recipe names no images
_SEED = 0  # of the order in which held-out rows are read: the same for all runs, so that their losses can be compared
_UNKNOWN_ANSWER = "unknown"  # of an image without a caption; collators refuse rows without answers


class HeldOutRows(NamedTuple):
    """Rows of evaluation, none without one, and rows for sample answers, with whether their captions are known."""

    evaluation: list[Row]
    samples: list[Row]
    captions_known: bool


def load_held_out(
    stage: StageArguments,
    config: StageConfig,
    features: Container[bytes] | None = None,
    evaluation: list[Row] | None = None,
) -> HeldOutRows:
    """
    The rows of `eval_sources` or `eval_share`, at most `eval_rows` of them, and those for sample answers.

    Args:
        stage (`StageArguments`), config (`StageConfig`): The recipe.
        features (`Container`, *optional*): Keys of the images in its feature cache.
        evaluation (`list`, *optional*): What [`split_dataset`] has held out already.

    Raises:
        DataError: for sources that cannot be opened, a share that holds out nothing, and an image that cannot be read.
    """
    if config.eval_sources:
        evaluation = _read(config.eval_sources, stage, config.eval_rows, None, features)
    elif config.eval_share is not None and evaluation is None:
        selection = Selection(config.eval_share, held_out=True)
        evaluation = _read(stage.sources, stage, config.eval_rows, selection, features)
    rows = evaluation or []
    if config.sample_images:
        return HeldOutRows(rows, [_sample(path, stage, features) for path in config.sample_images], False)
    return HeldOutRows(rows, list(islice((row for row in rows if len(row_images(row)) == 1), SAMPLES)), True)


def _read(
    names: list[str],
    stage: StageArguments,
    limit: int,
    selection: Selection | None,
    features: Container[bytes] | None,
) -> list[Row]:
    """Up to `limit` rows of all sources, in proportion to their weights; images stay undecoded, but can be decoded."""
    sources = [parse_source(name) for name in names]
    weights = [source.weight or 1.0 for source in sources]
    found: list[Row] = []
    for source, weight in zip(sources, weights):
        rows = open_rows(
            source,
            stage.prompt_format,
            seed=_SEED,
            epochs=1,
            decode=False,
            max_error_rate=stage.max_error_rate,
            features=features,
            selection=selection,
        )
        quota = max(1, round(limit * weight / sum(weights)))
        found += islice((row for row in rows.dataset if features is not None or _intact(row)), quota)
    if not found:
        raise DataError(f"no image of {', '.join(names)} can be read, so there is no row to evaluate on")
    return found


def _intact(row: Row) -> bool:
    try:
        for image in row_images(row):
            load_image(image_bytes(cast(UndecodedImage, image)))
    except (ImageLoadError, OSError) as error:
        logger.warning("not evaluated: %s of %s: %s", row.get("key"), row.get("source"), error)
        return False
    return True


def _sample(path: str, stage: StageArguments, features: Container[bytes] | None) -> Row:
    image: UndecodedImage = {"bytes": None, "path": path}
    try:
        load_image(Path(path))
    except (ImageLoadError, OSError) as error:
        raise DataError(f"sample_images: {error}") from error
    if features is not None and image_key(image) not in features:
        raise DataError(
            f"sample_images: the feature cache has no features of {path}; `minigpt4 features` with the same recipe "
            "adds them"
        )
    row = render(stage.prompt_format, [image], _UNKNOWN_ANSWER, None, INSTRUCTIONS[0])
    return {**row, "key": os.path.basename(path)}


def split_dataset(dataset: Dataset, share: float, limit: int) -> tuple[Dataset, list[Row]]:
    """
    A list of rows without those that are held out, and up to `limit` of these.

    Raises:
        DataError: for a share that leaves no row on one of the sides.
    """
    selection = Selection(share, held_out=True)
    sides: tuple[list[int], list[int]] = [], []
    for place, row in enumerate(dataset):
        sides[selection.selects_row(row)].append(place)
    if not all(sides):
        raise DataError(
            f"eval_share: {share} of {len(dataset)} rows leaves {len(sides[0])} to train on and holds out "
            f"{len(sides[1])}. Take another share, or eval_sources."
        )
    return dataset.select(sides[0]), [dataset[place] for place in sides[1][:limit]]
