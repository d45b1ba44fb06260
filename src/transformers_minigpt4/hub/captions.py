"""Reads a folder of captions that `minigpt4 describe` wrote, to publish it."""

import os
import re
from pathlib import Path

from datasets import Dataset, load_dataset

from transformers_minigpt4.utils.files import JsonObject


_SHARD = re.compile(r"captions-(\d+)-of-(\d+)\.(parquet|tar|jsonl)")
_COLUMNS = {
    "jpg": "image",
    "json.image": "key",
    "json.caption": "caption",
    "json.prompt": "prompt",
    "json.model": "model",
}


def caption_shards(folder: Path) -> list[Path]:
    """The files of captions in a folder, in order."""
    return sorted(path for path in folder.glob("captions-*") if _SHARD.fullmatch(path.name))


def read_captions(folder: Path, cache: Path) -> tuple[Dataset, JsonObject]:
    """
    The images and captions, and a record of how they were made for the card.

    Of paths on this computer, only what tells images apart is left.

    Args:
        folder: With all shards of one run.
        cache: Where `datasets` may write.

    Raises:
        ValueError: for a folder that lacks shards, has more than one run's, or has captions without images.
    """
    shards = caption_shards(folder)
    counts = {int(match[2]) for path in shards if (match := _SHARD.fullmatch(path.name))}
    kinds = {path.suffix for path in shards}
    if len(counts) > 1 or len(kinds) > 1:
        raise ValueError(f"{str(folder)!r} holds captions of more than one run; publish each folder by itself")
    if kinds == {".jsonl"}:
        raise ValueError(
            f"{str(folder)!r} holds captions without their images; describe them again with "
            "`--output parquet:FOLDER`, and publish that folder"
        )
    empty = sum(1 for _ in folder.glob(".captions-*.empty"))  # shards from which no image could be described
    if missing := counts.pop() - len(shards) - empty:
        raise ValueError(
            f"{missing} shards of captions are missing in {str(folder)!r}; run the same `minigpt4 describe` again to "
            "finish them"
        )
    files = [str(path) for path in shards]
    builder = "parquet" if kinds == {".parquet"} else "webdataset"
    data = load_dataset(builder, data_files=files, split="train", cache_dir=str(cache))
    if builder == "webdataset":
        data = data.flatten()
        data = data.rename_columns({old: new for old, new in _COLUMNS.items() if old in data.column_names})
        data = data.remove_columns([name for name in data.column_names if name not in _COLUMNS.values()])
    models = [_without_folder(model) for model in data["model"]]
    keys = _without_common_folder(list(data["key"]))
    data = data.remove_columns(["key", "model"]).add_column("key", keys).add_column("model", models)
    prompts = list(dict.fromkeys(data["prompt"]))
    return data, {"models": list(dict.fromkeys(models)), "prompts": prompts}


def _without_folder(model: str) -> str:
    return os.path.basename(os.path.normpath(model)) if os.path.isabs(model) or os.path.isdir(model) else model


def _without_common_folder(keys: list[str]) -> list[str]:
    """Keys without the folder that all paths among them are in."""
    paths = [key for key in keys if os.path.isabs(key)]
    if not paths:
        return keys
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(key, common) if os.path.isabs(key) else key for key in keys]
