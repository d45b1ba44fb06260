"""Training from cached features: batches that hold them, and a model that takes them."""

import copy
import dataclasses
import os
from collections.abc import Mapping

import torch
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, BatchFeature, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from transformers_minigpt4.data.images import image_key
from transformers_minigpt4.data.schema import Row, row_images

from .collator import Batch, ImageTextCollator
from .feature_cache import FeatureCache
from .fingerprints import feature_fingerprint
from .towerless import remove_tower


class FeatureCollator:
    """
    Wraps an `ImageTextCollator`; its batches have `image_features` `(images, K, W)` in place of `pixel_values`.

    Images are neither decoded nor resized: stand-ins of one pixel go through the processor, and give the order.

    Args:
        collator (`ImageTextCollator`): Collates rows.
        cache (`FeatureCache`): Holds every image of the rows.
    """

    def __init__(self, collator: ImageTextCollator, cache: FeatureCache) -> None:
        processor = copy.copy(collator.processor)
        blank = processor.image_processor(Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
        processor.image_processor = _StandInProcessor(processor.image_processor, blank.shape[1:])
        self.collator = dataclasses.replace(collator, processor=processor)
        self.cache = cache

    def __call__(self, examples: list[Row]) -> Batch:
        features: list[torch.Tensor] = []
        rows = []
        for example in examples:
            images = row_images(example)
            numbers = range(len(features), len(features) + len(images))
            features += [self.cache[image_key(image)] for image in images]
            row = {key: value for key, value in example.items() if key != "image"}
            rows.append({**row, "images": [_stand_in(number) for number in numbers]})
        batch = dict(self.collator(rows))
        pixels = batch.pop("pixel_values", None)
        if pixels is not None:
            batch["image_features"] = torch.stack([features[int(number)] for number in pixels[:, 0, 0, 0]])
        return batch


def train_from_features(
    model: PreTrainedModel, image_processor: BaseImageProcessor, folder: str | os.PathLike[str]
) -> FeatureCache:
    """
    Makes a model take `image_features`, and frees the memory of its tower and Q-Former.

    Args:
        model (`PreTrainedModel`): MiniGPT-4 or LLaVA, prepared for its stage, not yet wrapped for distribution.
        image_processor (`BaseImageProcessor`): The model's own.
        folder (`str` or `os.PathLike`): Folder of [`build_feature_cache`].

    Returns:
        [`FeatureCache`] for a [`FeatureCollator`].

    Raises:
        DataError: for a cache of other weights or another preparation of images.
        ValueError: for a model that trains tower, Q-Former or queries.
    """
    cache = FeatureCache(folder, feature_fingerprint(model, image_processor))
    take_features(model)
    remove_tower(model)
    return cache


def take_features(model: PreTrainedModel) -> None:
    """Makes a model take `image_features` in place of `pixel_values`."""
    model.base_model.register_forward_pre_hook(_project, with_kwargs=True)


def _project(module: nn.Module, args: tuple[object, ...], kwargs: Batch) -> tuple[tuple[object, ...], Batch]:
    features = kwargs.pop("image_features", None)
    if features is not None:
        kwargs["mm_encoder_outputs"] = encoder_outputs(module, features)
    return args, kwargs


def encoder_outputs(base: nn.Module, features: torch.Tensor) -> dict[str, BaseModelOutputWithPooling]:
    """
    The argument `mm_encoder_outputs` of a model or of its `generate`, for cached features.

    Args:
        base (`nn.Module`): Base model of a MiniGPT-4 or LLaVA.
        features (`torch.Tensor` of shape `(images, K, W)`): From a cache.
    """
    projector = base.get_submodule("multi_modal_projector")
    projected = projector(features.to(next(projector.parameters()).dtype))
    # LLaVA takes a list of one tensor per image; MiniGPT-4 takes it as well.
    return {"image": BaseModelOutputWithPooling(pooler_output=list(projected))}  # type: ignore[arg-type]


class _StandInProcessor:
    """An image processor that turns stand-ins into `pixel_values` whose every pixel is their number."""

    def __init__(self, image_processor: BaseImageProcessor, shape: torch.Size) -> None:
        self.image_processor, self.shape = image_processor, shape

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or "image_processor" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.image_processor, name)

    def __call__(self, images: list[Image.Image | list[Image.Image]], **kwargs: object) -> Mapping[str, torch.Tensor]:
        flat = [image for row in images for image in (row if isinstance(row, (list, tuple)) else [row])]
        numbers = []
        for image in flat:
            red, green, blue = image.tobytes()
            numbers.append(red + (green << 8) + (blue << 16))
        pixels = torch.tensor(numbers, dtype=torch.float32)[:, None, None, None]
        return BatchFeature({"pixel_values": pixels.expand(-1, *self.shape)})


def _stand_in(number: int) -> Image.Image:
    return Image.new("RGB", (1, 1), (number & 255, number >> 8 & 255, number >> 16))
