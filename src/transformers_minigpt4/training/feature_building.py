"""Builds feature caches: each image is encoded once by the frozen modules in front of the projector."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, BaseImageProcessor, PreTrainedModel
from transformers.utils import logging
from trl import ModelConfig

from transformers_minigpt4.data.images import image_key
from transformers_minigpt4.data.schema import RowImage, UndecodedImage, row_images
from transformers_minigpt4.data.sources import open_rows
from transformers_minigpt4.processing.image_utils_minigpt4 import load_image
from transformers_minigpt4.utils.checkpoint_files import loading_from
from transformers_minigpt4.utils.text import first_line

from .arguments import PYTHON, StageArguments, StageConfig
from .feature_cache import load_keys, open_index, shard_paths, write_shard
from .fingerprints import feature_fingerprint
from .loading import call_for_rows, find_model
from .stages import ImageEncoder, prepare_stage


logger = logging.get_logger(__name__)


def build_features(stage: StageArguments, config: StageConfig, model_args: ModelConfig) -> dict[str, int]:
    """
    Adds the images of a recipe to its `feature_cache`, those that are missing from it.

    Returns:
        `dict[str, int]`: Images `encoded` now, `present` before, and `broken` ones.

    Raises:
        ValueError: for a recipe without `feature_cache`, or one that cannot use it.
        DataError: for a folder that was built with other weights, and for a source without usable rows.
    """
    if stage.feature_cache is None:
        raise ValueError("The recipe names no folder for features. Set --feature-cache FOLDER.")
    source = find_model(stage, config, model_args)
    images = _images(stage, config)
    with loading_from(source.name):
        model = AutoModelForImageTextToText.from_pretrained(source.name, **source.keywords)
    prepare_stage(model, stage.trainable_modules)
    if not getattr(model, "is_quantized", False):
        nn.Module.to(model, config.device)  # mypy cannot read the decorated method of transformers
    return build_feature_cache(
        model, source.processor.image_processor, images, stage.feature_cache, source=source.digest
    )


def _images(stage: StageArguments, config: StageConfig) -> Iterator[RowImage]:
    """Every image of the sources, as training has them."""
    datasets: list[Dataset | IterableDataset]
    if stage.sources[0].startswith(PYTHON):
        datasets = [call_for_rows(stage, config)]
    else:
        datasets = [
            open_rows(source, stage.prompt_format, shuffle=False, epochs=1, decode=False, max_error_rate=None).dataset
            for source in [*stage.sources, *config.eval_sources]
        ]
    yield from (UndecodedImage(bytes=None, path=path) for path in config.sample_images)
    for dataset in datasets:
        for row in dataset:
            yield from row_images(row)


def build_feature_cache(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    images: Iterable[RowImage],
    folder: str | os.PathLike[str],
    batch_size: int = 32,
    shard_size: int = 4096,
    source: str | None = None,
) -> dict[str, int]:
    """
    Encodes images that the folder does not hold yet.

    If interrupted, call it again to resume after the last complete shard; several processes may fill one folder at the
    same time.

    Args:
        model (`PreTrainedModel`): MiniGPT-4 or LLaVA, on the device that encodes.
        image_processor (`BaseImageProcessor`): The model's own.
        images (`Iterable`): Finite; each as [`image_key`] takes it.
        folder (`str` or `os.PathLike`): Created if it does not exist.
        batch_size (`int`, *optional*, defaults to 32): Images encoded at a time.
        shard_size (`int`, *optional*, defaults to 4096): Images in a file; 4096 of 32 x 768 take 200 MB.
        source (`str`, *optional*): Digest of the files that the model was loaded from and of how; kept in the index,
            it opens the cache without the model, see [`FeatureCache`].

    Returns:
        `dict[str, int]`: Images `encoded` now, `present` before, and `broken` ones, which are left out.

    Raises:
        DataError: for a folder that was built with other weights or another preparation of images.
    """
    folder = Path(folder)
    fingerprint = feature_fingerprint(model, image_processor)
    open_index(folder, fingerprint, source)
    done = {key.tobytes() for path in shard_paths(folder, fingerprint) for key in load_keys(path)}
    counts = {"encoded": 0, "present": 0, "broken": 0}
    keys: list[bytes] = []
    features: list[torch.Tensor] = []
    mode = model.training
    model.eval()
    try:
        missing = _missing(images, done, counts)
        with tqdm(desc="features", unit=" images", disable=None) as progress:
            while batch := list(islice(missing, batch_size)):
                features += _encode(model, image_processor, [image for _, image in batch])
                keys += [key for key, _ in batch]
                counts["encoded"] += len(batch)
                progress.update(len(batch))
                while len(keys) >= shard_size:
                    write_shard(folder, fingerprint, keys[:shard_size], features[:shard_size])
                    del keys[:shard_size], features[:shard_size]
    finally:
        if keys and len(features) >= len(keys):  # what an interruption would lose
            write_shard(folder, fingerprint, keys, features[: len(keys)])
        model.train(mode)
    return counts


def _missing(
    images: Iterable[RowImage], done: set[bytes], counts: dict[str, int]
) -> Iterator[tuple[bytes, Image.Image]]:
    """Images that are not done, each once, decoded."""
    for image in images:
        try:
            key = image_key(image)
            if key in done:
                counts["present"] += 1
                continue
            decoded = load_image(image.get("bytes") or image["path"] if isinstance(image, dict) else image)
        except (OSError, ValueError) as error:
            counts["broken"] += 1
            logger.warning(f"An image is left out of the features: {first_line(error):.200}")
            continue
        done.add(key)
        yield key, decoded


def _encode(
    model: PreTrainedModel, image_processor: BaseImageProcessor, images: list[Image.Image]
) -> list[torch.Tensor]:
    """The projector's input for each image, bf16 of shape `(K, W)`."""
    seen: list[torch.Tensor] = []
    base = model.base_model
    projector = base.get_submodule("multi_modal_projector")
    hook = projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    weight = next(base.get_submodule("vision_tower").parameters())
    pixels = image_processor(images, return_tensors="pt")["pixel_values"].to(weight.device, weight.dtype)
    try:
        with torch.no_grad():
            cast(ImageEncoder, model).get_image_features(pixels)
    finally:
        hook.remove()
    return list(seen[0].to("cpu", torch.bfloat16))
