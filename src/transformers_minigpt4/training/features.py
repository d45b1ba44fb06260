"""Frozen image features on disk: each picture is encoded once, and training needs no vision tower any more."""

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from transformers_minigpt4.data.images import image_key
from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.processing.image_utils_minigpt4 import load_image


logger = logging.get_logger(__name__)

INDEX = "features.json"
FORMAT = 1
KEY_BYTES = hashlib.sha256().digest_size
FROZEN = ("vision_tower", "qformer", "query_tokens")  # what features depend on; the projection comes after them
# What config and image processor say about themselves, not about features.
_BESIDE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "processor_class", "architectures"}


def describe_preparation(config: dict[str, Any], image_processor: Any) -> dict[str, Any]:
    """What features depend on besides weights: the config of the frozen parts, and the preparation of pictures."""
    frozen = {key: value for key, value in config.items() if key.startswith("vision") or key == "qformer_config"}
    return _without({"format": FORMAT, "image_processor": image_processor.to_dict(), "config": frozen})


def feature_fingerprint(model: PreTrainedModel, image_processor: Any) -> str:
    """
    Digest of all that features depend on besides the picture: frozen weights, their config, preparation of pictures.

    Raises:
        ValueError: for a model whose features change in training, or that has no vision tower (any more).
    """
    base: Any = model.base_model
    if not isinstance(getattr(base, "vision_tower", None), PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} has no vision tower to take features from. Take a model as it was loaded."
        )
    frozen = {name: value for name, value in base.named_parameters() if name.split(".")[0] in FROZEN}
    learning = [name for name, value in frozen.items() if value.requires_grad]
    if learning:
        raise ValueError(
            f"{len(learning)} parameters in front of the projection train ({learning[0]}, …), so features change with "
            "every step and cannot be kept. Train the projection or the language model alone, or use no cache."
        )
    buffers = {name: value for name, value in base.named_buffers() if name.split(".")[0] in FROZEN}
    described = describe_preparation(model.config.to_dict(), image_processor)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, value in sorted({**frozen, **buffers}.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build_feature_cache(
    model: PreTrainedModel,
    image_processor: Any,
    pictures: Iterable[Any],
    folder: str | os.PathLike,
    batch_size: int = 32,
    shard_size: int = 4096,
    source: str | None = None,
) -> dict[str, int]:
    """
    Encodes pictures that the folder does not hold yet.

    A stopped call goes on where the last whole shard ended; several processes may fill one folder at the same time.

    Args:
        model (`PreTrainedModel`): MiniGPT-4 or LLaVA, on the device that shall encode.
        image_processor: The model's own.
        pictures (`Iterable`): Finite; each as [`picture_key`] takes it.
        folder (`str` or `os.PathLike`): Made where it lacks.
        batch_size (`int`, *optional*, defaults to 32): Pictures encoded at a time.
        shard_size (`int`, *optional*, defaults to 4096): Pictures in a file; 4096 of 32 x 768 take 200 MB.
        source (`str`, *optional*): Digest of the files that the model was loaded from and of how; kept in the index,
            it opens the cache without the model, see [`FeatureCache`].

    Returns:
        `dict[str, int]`: Pictures `encoded` now, `present` before, and `broken` ones, which are left out.

    Raises:
        DataError: for a folder that was built with other weights or another preparation of pictures.
    """
    folder = Path(folder)
    fingerprint = feature_fingerprint(model, image_processor)
    _open_index(folder, fingerprint, source)
    shards = _shards(folder, fingerprint)
    done = {key.tobytes() for path in shards for key in _load_keys(path)}
    counts = {"encoded": 0, "present": 0, "broken": 0}
    keys: list[bytes] = []
    features: list[torch.Tensor] = []
    mode = model.training
    model.eval()
    try:
        with tqdm(desc="features", unit=" pictures", disable=None) as progress:
            for batch in _batches(_new(pictures, done, counts), batch_size):
                features += _encode(model, image_processor, [picture for _, picture in batch])
                keys += [key for key, _ in batch]
                counts["encoded"] += len(batch)
                progress.update(len(batch))
                while len(keys) >= shard_size:
                    _write_shard(folder, fingerprint, keys[:shard_size], features[:shard_size])
                    del keys[:shard_size], features[:shard_size]
    finally:
        if keys and len(features) >= len(keys):  # what an interruption would lose
            _write_shard(folder, fingerprint, keys, features[: len(keys)])
        model.train(mode)
    return counts


class FeatureCache:
    """
    Reads features of one folder, memory-mapped; safe to hand to data workers.

    Args:
        folder (`str` or `os.PathLike`): Folder of [`build_feature_cache`].
        fingerprint (`str`, *optional*):
            What [`feature_fingerprint`] says of model and image processor. Without one, the folder is taken as it is:
            check the model in another way.
        source (`str`, *optional*): In its place, a digest that [`build_feature_cache`] was given.

    Raises:
        DataError: for a folder that is none, was built with other weights or preparation, or has a broken file.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: str | None = None, source: str | None = None):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise DataError(f"{folder} is no feature cache: it has no {INDEX}. Build one with `minigpt4 features`.")
        index = _read_index(self.folder)
        if source is not None and source not in index.get("sources", []):
            raise DataError(
                f"The features in {folder} were built with other frozen weights, another dtype of them, or another "
                "preparation of pictures than this recipe has, or from another copy of its model. `minigpt4 features` "
                "with the recipe tells which: it encodes what lacks, or names what is wrong."
            )
        fingerprint = index["fingerprint"] if fingerprint is None else fingerprint
        _open_index(self.folder, fingerprint)
        self.paths = _shards(self.folder, fingerprint)
        if not self.paths:
            raise DataError(f"{folder} holds no features yet. Build them with `minigpt4 features`.")
        self._keys = [_load_keys(path) for path in self.paths]
        starts = np.cumsum([0, *map(len, self._keys)])
        self._starts = starts[:-1]
        prefixes = np.concatenate([_prefix(keys) for keys in self._keys])
        self._order = np.argsort(prefixes, kind="stable")
        self._prefixes = prefixes[self._order]
        self._files: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files do not travel to data workers

    def __contains__(self, key: object) -> bool:
        """Whether the cache holds features of an image with this key."""
        return isinstance(key, bytes) and self._place(key) is not None

    def __getitem__(self, key: bytes) -> torch.Tensor:
        """
        Features of a picture, bf16 of shape `(K, W)`, as the projection takes them.

        Raises:
            DataError: for a picture that the cache does not hold.
        """
        place = self._place(key)
        if place is None:
            raise DataError(missing_features(self.folder, key))
        shard, row = place
        if shard not in self._files:
            self._files[shard] = safe_open(self.paths[shard], "pt").__enter__()
        return self._files[shard].get_slice("features")[row]

    def _place(self, key: bytes) -> tuple[int, int] | None:
        """File and row of a picture."""
        wanted = np.frombuffer(key, np.uint8)
        place = int(np.searchsorted(self._prefixes, _prefix(wanted[None])[0]))
        while place < len(self) and self._prefixes[place] == _prefix(wanted[None])[0]:
            number = int(self._order[place])
            shard = int(np.searchsorted(self._starts, number, side="right")) - 1
            row = number - int(self._starts[shard])
            if np.array_equal(self._keys[shard][row], wanted):
                return shard, row
            place += 1
        return None


def missing_features(folder: Path, key: bytes) -> str:
    """What to say of a picture that a cache lacks."""
    return (
        f"{folder} holds no features of picture {key.hex()[:16]}…. Build the cache from the rows that are trained on, "
        "undecoded or decoded as they are there: `minigpt4 features` with the same recipe goes on with what lacks."
    )


class FeatureCollator:
    """
    Goes around an `ImageTextCollator`; its batches have `image_features` `(images, K, W)` in place of `pixel_values`.

    Pictures are neither decoded nor resized: stand-ins of one pixel go through the processor, and tell the order.

    Args:
        collator (`ImageTextCollator`): Collates rows; a dataclass with a `processor`.
        cache (`FeatureCache`): Holds every picture of the rows.
    """

    def __init__(self, collator: Any, cache: FeatureCache):
        processor = copy.copy(collator.processor)
        blank = processor.image_processor(Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
        processor.image_processor = _StandInProcessor(processor.image_processor, blank.shape[1:])
        self.collator: Callable = dataclasses.replace(collator, processor=processor)
        self.cache = cache

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        features: list[torch.Tensor] = []
        rows = []
        for example in examples:
            images = [example["image"]] if example.get("image") is not None else list(example.get("images") or [])
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
    model: PreTrainedModel, image_processor: Any, folder: str | os.PathLike, keep_tower: bool = False
) -> FeatureCache:
    """
    Makes a model take `image_features`, and takes tower and Q-Former out of it and of memory.

    Args:
        model (`PreTrainedModel`): MiniGPT-4 or LLaVA, prepared for its stage, not yet wrapped for distribution.
        image_processor: The model's own.
        folder (`str` or `os.PathLike`): Folder of [`build_feature_cache`].
        keep_tower (`bool`, *optional*, defaults to `False`): Leave them there, for generation between steps.

    Returns:
        [`FeatureCache`] for a [`FeatureCollator`].

    Raises:
        DataError: for a cache of other weights or another preparation of pictures.
        ValueError: for a model that trains tower, Q-Former or queries.
    """
    cache = FeatureCache(folder, feature_fingerprint(model, image_processor))
    take_features(model)
    if not keep_tower:
        remove_tower(model)
    return cache


def take_features(model: PreTrainedModel) -> None:
    """Makes a model take `image_features` in place of `pixel_values`."""
    base: Any = model.base_model
    base.register_forward_pre_hook(_project, with_kwargs=True)


def remove_tower(model: PreTrainedModel) -> None:
    """Takes tower and Q-Former out of a model; what stands in their place says so when it is called."""
    base: Any = model.base_model
    for name in FROZEN[:2]:
        if getattr(base, name, None) is not None:
            setattr(base, name, _Removed(name))


def has_tower(model: PreTrainedModel) -> bool:
    """Whether a model has its vision tower, or one was taken out."""
    return not isinstance(getattr(model.base_model, "vision_tower", None), _Removed)


def _project(module: Any, args: Any, kwargs: dict[str, Any]):
    features = kwargs.pop("image_features", None)
    if features is not None:
        projector = module.multi_modal_projector
        projected = projector(features.to(next(projector.parameters()).dtype))
        # LLaVA takes a list of one tensor per image; MiniGPT-4 takes it as well.
        kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=list(projected))}
    return args, kwargs


class _Removed(nn.Module):
    """Stands where a frozen part was, and says so."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any):
        raise RuntimeError(
            f"The {self.name} was taken out, because this model trains from cached features. Give it image_features, "
            "load it anew, or keep the tower with train_from_features(…, keep_tower=True)."
        )


class _StandInProcessor:
    """An image processor that turns stand-ins into `pixel_values` whose every pixel is their number."""

    def __init__(self, image_processor: Any, shape: torch.Size):
        self.image_processor, self.shape = image_processor, shape

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "image_processor" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.image_processor, name)

    def __call__(self, images: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        flat = [image for row in images for image in (row if isinstance(row, (list, tuple)) else [row])]
        numbers = []
        for image in flat:
            red, green, blue = image.getpixel((0, 0))
            numbers.append(red + (green << 8) + (blue << 16))
        return {
            "pixel_values": torch.tensor(numbers, dtype=torch.float32)[:, None, None, None].expand(-1, *self.shape)
        }


def _stand_in(number: int) -> Image.Image:
    return Image.new("RGB", (1, 1), (number & 255, number >> 8 & 255, number >> 16))


def _encode(model: PreTrainedModel, image_processor: Any, pictures: list[Image.Image]) -> list[torch.Tensor]:
    """What the projection is given for each picture, bf16 of shape `(K, W)`."""
    base: Any = model.base_model
    seen: list[torch.Tensor] = []
    hook = base.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    weight = next(base.vision_tower.parameters())
    pixels = image_processor(pictures, return_tensors="pt")["pixel_values"].to(weight.device, weight.dtype)
    try:
        with torch.no_grad():
            model.get_image_features(pixels)
    finally:
        hook.remove()
    return list(seen[0].to("cpu", torch.bfloat16))


def _new(pictures: Iterable[Any], done: set[bytes], counts: dict[str, int]) -> Iterator[tuple[bytes, Image.Image]]:
    """Pictures that are not done, each once, decoded."""
    for picture in pictures:
        try:
            key = image_key(picture)
            if key in done:
                counts["present"] += 1
                continue
            content = picture if not isinstance(picture, dict) else picture.get("bytes") or picture["path"]
            image = load_image(content)
        except (OSError, ValueError) as error:
            counts["broken"] += 1
            logger.warning(f"A picture is left out of the features: {str(error).splitlines()[0]:.200}")
            continue
        done.add(key)
        yield key, image


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


def _write_shard(folder: Path, fingerprint: str, keys: list[bytes], features: list[torch.Tensor]) -> None:
    """A file appears whole, under a name that its content gives, or not at all."""
    table = torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES).copy())
    name = f"features-{hashlib.sha256(b''.join(keys)).hexdigest()[:16]}.safetensors"
    staged = folder / f".{name}.{os.getpid()}"
    try:
        save_file({"features": torch.stack(features), "keys": table}, staged, metadata={"fingerprint": fingerprint})
        with open(staged, "rb") as file:
            os.fsync(file.fileno())
        os.replace(staged, folder / name)
    finally:
        staged.unlink(missing_ok=True)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        index["format"], index["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no index of features ({error!r:.80}). Delete the folder and build anew."
        ) from error
    return index


def _open_index(folder: Path, fingerprint: str, source: str | None = None) -> None:
    """Checks the folder's index, or writes one into a folder without; adds a source that it does not name yet."""
    known = (folder / INDEX).is_file()
    index: dict[str, Any] = {"format": FORMAT, "fingerprint": fingerprint, "sources": []}
    if known:
        index = _read_index(folder)
    if (index["format"], index["fingerprint"]) != (FORMAT, fingerprint):
        raise DataError(
            f"The features in {folder} were built with other frozen weights, another dtype of them, or another "
            "preparation of pictures than this model has. Build them anew in another folder."
        )
    sources = set(index.get("sources", [])) | ({source} if source else set())
    if known and sources == set(index.get("sources", [])):
        return
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".{INDEX}.{os.getpid()}"
    staged.write_text(json.dumps({**index, "sources": sorted(sources)}) + "\n", encoding="utf-8")
    os.replace(staged, folder / INDEX)


def _shards(folder: Path, fingerprint: str) -> list[Path]:
    """The folder's files of features, each checked to be whole and of these weights."""
    paths = sorted(folder.glob("features-*.safetensors"))
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                found, names = (file.metadata() or {}).get("fingerprint"), set(file.keys())
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is broken ({error}). Delete it and build again what it held.") from error
        if found != fingerprint or names != {"features", "keys"}:
            raise DataError(f"{path} was built with other frozen weights than the folder's others. Delete it.")
    return paths


def _load_keys(path: Path) -> np.ndarray:
    """Keys of a file, `(pictures, 32)` bytes."""
    with safe_open(path, "np") as file:
        return file.get_tensor("keys")


def _prefix(keys: np.ndarray) -> np.ndarray:
    """The first eight bytes of each key as a number, by which they are sorted."""
    return np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0]


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(entry) for key, entry in value.items() if key not in _BESIDE}
    return [_without(entry) for entry in value] if isinstance(value, (list, tuple)) else value
