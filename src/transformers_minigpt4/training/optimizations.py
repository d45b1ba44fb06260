"""What makes a recipe's steps cheap: cached features in place of a tower, packed rows, logits at labels alone."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import LlavaForConditionalGeneration, PreTrainedModel

from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from transformers_minigpt4.modeling.trained_modules_minigpt4 import checkpoint_files, target_name

from .arguments import StageArguments, StageConfig
from .features import (
    FROZEN,
    FeatureCache,
    FeatureCollator,
    describe_preparation,
    has_tower,
    remove_tower,
    take_features,
    train_from_features,
)
from .loss import LabelledCollator, keep_labelled
from .packing import pack


# Models whose projection can be given features, by `model_type`.
TOWERS: dict[str, type[PreTrainedModel]] = {
    "minigpt4": MiniGPT4ForConditionalGeneration,
    "llava": LlavaForConditionalGeneration,
}
_CHUNK = 1 << 20  # bytes read at a time


def shorten(
    stage: StageArguments, config: StageConfig, model: PreTrainedModel, processor: Any, collator: Callable
) -> Callable:
    """
    Goes around a collator, and into a prepared model, with the shortcuts that recipe and model allow.

    Logits are computed at labels alone wherever that can be: not for an encoder-decoder, which has its own labels, and
    not on several GPUs in one process, among which torch would cut the batch by rows.

    Raises:
        DataError: for a cache of other weights, where the model has its tower; without one, see [`source_digest`].
        ValueError: for rows of a model that cannot be packed.
    """
    if stage.feature_cache is not None:
        if has_tower(model):
            cache = train_from_features(model, processor.image_processor, stage.feature_cache)
        else:
            take_features(model)
            cache = FeatureCache(stage.feature_cache)
        collator = FeatureCollator(collator, cache)
    if stage.pack_rows:
        collator = pack(model, collator, stage.pack_tokens)
    if model.config.model_type != "blip-2" and config.n_gpu <= 1:
        keep_labelled(model)
        collator = LabelledCollator(collator)
    return collator


def load_towerless(model_type: str, name: str, **keywords: Any) -> PreTrainedModel:
    """
    `from_pretrained` without vision tower and Q-Former, whose weights are not even read.

    Args:
        model_type (`str`): A key of `TOWERS`.
        name (`str`): Folder or Hub id.
        keywords: For `from_pretrained`.
    """
    model_class = TOWERS[model_type]

    def initialise(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)  # on the meta device: nothing is allocated yet
        remove_tower(self)
        self._keys_to_ignore_on_load_unexpected |= {rf"(^|\.){part}\." for part in FROZEN[:2]}

    # transformers knows how to rename old weights by the name and module of a class.
    namespace = {"__init__": initialise, "__module__": model_class.__module__}
    towerless: Any = type(model_class.__name__, (model_class,), namespace)
    model = towerless.from_pretrained(name, **keywords)
    model.__class__ = model_class
    return model


def restore_tower(model: PreTrainedModel) -> None:
    """Puts the tower back from where the model came from, so that it can be saved whole."""
    revision = getattr(model.config, "_commit_hash", None)
    whole: Any = type(model).from_pretrained(model.name_or_path, dtype=model.dtype, revision=revision)
    for part in FROZEN[:2]:
        if getattr(whole.base_model, part, None) is not None:
            setattr(model.base_model, part, getattr(whole.base_model, part))


def source_digest(
    name: str, config: Any, image_processor: Any, how: dict[str, Any], revision: str | None = None
) -> str:
    """
    Digest of a checkpoint's frozen parts as its files have them, and of how they are loaded and pictures prepared.

    It stands for the weights in memory without having them there: the files are read in pieces, to the last byte.

    Args:
        name (`str`): Folder or Hub id.
        config: The checkpoint's config.
        image_processor: The model's own.
        how (`dict`): What else decides on the weights in memory, such as dtype and quantisation.
        revision (`str`, *optional*): Of the Hub.

    Raises:
        OSError: for a checkpoint that cannot be read.
        ValueError: for one whose files hold no tower.
    """
    found: dict[str, tuple[Path, int, int, str]] = {}
    for base in getattr(config, "base_checkpoints", None) or []:  # a checkpoint of trained parts stands on others
        files = checkpoint_files(base["name_or_path"], revision=base["revision"])
        found.update(_frozen_tensors(files, base["prefixes"]))
    found.update(_frozen_tensors(checkpoint_files(name, revision=revision), {"": ""}))
    if not found:
        raise ValueError(f"{name} has no vision tower to take features from. Take a whole checkpoint.")
    described = {"how": how, "preparation": describe_preparation(config.to_dict(), image_processor)}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for tensor, (path, begin, end, form) in sorted(found.items()):
        digest.update(f"{tensor} {form}".encode())
        with open(path, "rb") as file:
            file.seek(begin)
            while begin < end:
                digest.update(file.read(min(_CHUNK, end - begin)))
                begin += _CHUNK
    return digest.hexdigest()


def _frozen_tensors(files: list[Path], prefixes: dict[str, str]) -> dict[str, tuple[Path, int, int, str]]:
    """Place and form of the frozen parts' tensors in safetensors files, by their names from the part on."""
    found = {}
    for path in files:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for key, entry in header.items():
            name = None if key == "__metadata__" else target_name(key, prefixes)
            parts = [] if name is None else name.split(".")
            start = next((place for place, part in enumerate(parts) if part in FROZEN), None)
            if start is not None:
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                found[".".join(parts[start:])] = path, begin, end, f"{entry['dtype']} {entry['shape']}"
    return found
