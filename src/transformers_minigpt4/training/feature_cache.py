"""Features of images on disk: an index, files of features, and their lookup by an image's key."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.utils.files import atomic_file, write_atomically


INDEX = "features.json"
FORMAT = 1
KEY_BYTES = hashlib.sha256().digest_size


class FeatureCache:
    """
    Reads the features in a folder, memory-mapped; can be passed to data workers.

    Args:
        folder (`str` or `os.PathLike`): Folder of [`build_feature_cache`].
        fingerprint (`str`, *optional*):
            The [`feature_fingerprint`] of model and image processor. Without one, the folder is not checked against a
            model: check it in another way.
        source (`str`, *optional*): In its place, a digest that [`build_feature_cache`] was given.

    Raises:
        DataError: for a folder that is not a cache, was built with other weights or preparation, or has a broken file.
    """

    def __init__(
        self, folder: str | os.PathLike[str], fingerprint: str | None = None, source: str | None = None
    ) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise DataError(f"{folder} is not a feature cache: it has no {INDEX}. Build one with `minigpt4 features`.")
        index = _read_index(self.folder)
        if source is not None and source not in index.get("sources", []):
            raise DataError(
                f"The features in {folder} were built with other frozen weights, another dtype of them, or another "
                "preparation of images than this recipe has, or from another copy of its model. Run `minigpt4 "
                "features` with the recipe to find out: it adds the missing features, or names what is wrong."
            )
        fingerprint = index["fingerprint"] if fingerprint is None else fingerprint
        open_index(self.folder, fingerprint)
        self.paths = shard_paths(self.folder, fingerprint)
        if not self.paths:
            raise DataError(f"{folder} contains no features yet. Build them with `minigpt4 features`.")
        self._keys = [load_keys(path) for path in self.paths]
        starts = np.cumsum([0, *map(len, self._keys)])
        self._starts = starts[:-1]
        prefixes = np.concatenate([_prefix(keys) for keys in self._keys])
        self._order = np.argsort(prefixes, kind="stable")
        self._prefixes = prefixes[self._order]
        self._files: dict[int, safe_open] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}  # data workers open the files themselves

    def __contains__(self, key: object) -> bool:
        """Whether the cache holds features of an image with this key."""
        return isinstance(key, bytes) and self._place(key) is not None

    def __getitem__(self, key: bytes) -> torch.Tensor:
        """
        Features of an image, bf16 of shape `(K, W)`, as the projector takes them.

        Raises:
            DataError: for an image that the cache does not hold.
        """
        place = self._place(key)
        if place is None:
            raise DataError(
                f"{self.folder} holds no features of image {key.hex()[:16]}…. Build the cache from the rows that are "
                "trained on, undecoded or decoded as they are there: `minigpt4 features` with the same recipe adds "
                "the missing ones."
            )
        shard, row = place
        if shard not in self._files:
            self._files[shard] = safe_open(self.paths[shard], "pt").__enter__()
        return self._files[shard].get_slice("features")[row]

    def _place(self, key: bytes) -> tuple[int, int] | None:
        """File and row of an image."""
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


def open_index(folder: Path, fingerprint: str, source: str | None = None) -> None:
    """
    Checks the folder's index, or creates it if there is none; adds a source that it does not name yet.

    Raises:
        DataError: for a folder that was built with other weights or another preparation of images.
    """
    known = (folder / INDEX).is_file()
    index: dict[str, Any] = {"format": FORMAT, "fingerprint": fingerprint, "sources": []}
    if known:
        index = _read_index(folder)
    if (index["format"], index["fingerprint"]) != (FORMAT, fingerprint):
        raise DataError(
            f"The features in {folder} were built with other frozen weights, another dtype of them, or another "
            "preparation of images than this model has. Build them in another folder."
        )
    sources = set(index.get("sources", [])) | ({source} if source else set())
    if known and sources == set(index.get("sources", [])):
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / INDEX, json.dumps({**index, "sources": sorted(sources)}) + "\n")


def shard_paths(folder: Path, fingerprint: str) -> list[Path]:
    """
    The folder's files of features, each checked to be complete and of these weights.

    Raises:
        DataError: for a broken file, and for one of other weights.
    """
    paths = sorted(folder.glob("features-*.safetensors"))
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                found, names = (file.metadata() or {}).get("fingerprint"), set(file.keys())
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is broken ({error}). Delete it and rebuild the features that it held.") from error
        if found != fingerprint or names != {"features", "keys"}:
            raise DataError(f"{path} was built with other frozen weights than the folder's other files. Delete it.")
    return paths


def load_keys(path: Path) -> np.ndarray:
    """Keys of the images in a file, `(images, 32)` bytes."""
    with safe_open(path, "np") as file:
        return file.get_tensor("keys")


def write_shard(folder: Path, fingerprint: str, keys: list[bytes], features: list[torch.Tensor]) -> None:
    """Writes a file of features under a name that its keys determine; it appears complete or not at all."""
    table = torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES).copy())
    name = f"features-{hashlib.sha256(b''.join(keys)).hexdigest()[:16]}.safetensors"
    with atomic_file(folder / name) as scratch:
        save_file({"features": torch.stack(features), "keys": table}, scratch, metadata={"fingerprint": fingerprint})
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        index["format"], index["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not an index of features ({error!r:.80}). Delete the folder and rebuild it."
        ) from error
    return index


def _prefix(keys: np.ndarray) -> np.ndarray:
    """The first eight bytes of each key as a number, by which they are sorted."""
    return np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0]
