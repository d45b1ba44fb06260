"""Digests of everything that cached features depend on, from a model in memory or from a checkpoint's files."""

import hashlib
import json
from pathlib import Path

import torch
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from transformers_minigpt4.modeling.trained_modules_minigpt4 import checkpoint_files, target_name
from transformers_minigpt4.utils.families import MINIGPT4
from transformers_minigpt4.utils.safetensors_files import TensorSpan, tensor_spans

from .feature_cache import FORMAT


IMAGE_MODULES = MINIGPT4.image_modules  # of every family, some of these
# What config and image processor say about themselves, not about features.
_IRRELEVANT = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "processor_class", "architectures"}
_CHUNK = 1 << 20  # bytes read at a time


def feature_fingerprint(model: PreTrainedModel, image_processor: BaseImageProcessor) -> str:
    """
    Digest of everything that features depend on besides the image: frozen weights, their config, image preparation.

    Raises:
        ValueError: for a model whose features change in training, or that has no vision tower (any more).
    """
    base = model.base_model
    if not isinstance(getattr(base, "vision_tower", None), PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} has no vision tower to compute features with. Load the complete model."
        )
    frozen = {name: value for name, value in base.named_parameters() if name.split(".")[0] in IMAGE_MODULES}
    learning = [name for name, value in frozen.items() if value.requires_grad]
    if learning:
        raise ValueError(
            f"{len(learning)} parameters in front of the projector train ({learning[0]}, …), so features change with "
            "every step and cannot be cached. Train only the projector or the language model, or use no cache."
        )
    buffers = {name: value for name, value in base.named_buffers() if name.split(".")[0] in IMAGE_MODULES}
    digest = hashlib.sha256(_described(_preparation(model.config, image_processor)))
    for name, value in sorted({**frozen, **buffers}.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def source_digest(
    name: str,
    config: PreTrainedConfig,
    image_processor: BaseImageProcessor,
    how: dict[str, object],
    revision: str | None = None,
) -> str:
    """
    Digest of a checkpoint's frozen image modules as its files have them, and of how they are loaded and images
    prepared.

    It represents the weights in memory without loading them: the files are read in chunks, to the last byte.

    Args:
        name (`str`): Folder or Hub id.
        config (`PreTrainedConfig`): The checkpoint's config.
        image_processor (`BaseImageProcessor`): The model's own.
        how (`dict`): Everything else that decides on the weights in memory, such as dtype and quantization.
        revision (`str`, *optional*): Of the Hub.

    Raises:
        OSError: for a checkpoint that cannot be read.
        ValueError: for one whose files contain no vision tower.
    """
    found: dict[str, tuple[Path, TensorSpan]] = {}
    for base in getattr(config, "base_checkpoints", None) or []:  # of a checkpoint that holds trained modules only
        files = checkpoint_files(base["name_or_path"], revision=base["revision"])
        found.update(_image_tensors(files, base["prefixes"]))
    found.update(_image_tensors(checkpoint_files(name, revision=revision), {"": ""}))
    if not found:
        raise ValueError(f"{name} has no vision tower to compute features with. Take a complete checkpoint.")
    digest = hashlib.sha256(_described({"how": how, "preparation": _preparation(config, image_processor)}))
    for tensor, (path, span) in sorted(found.items()):
        digest.update(f"{tensor} {span.dtype} {list(span.shape)}".encode())
        with open(path, "rb") as file:
            file.seek(span.begin)
            for begin in range(span.begin, span.end, _CHUNK):
                digest.update(file.read(min(_CHUNK, span.end - begin)))
    return digest.hexdigest()


def _image_tensors(files: list[Path], prefixes: dict[str, str]) -> dict[str, tuple[Path, TensorSpan]]:
    """The image modules' tensors in safetensors files, by their names from the module on."""
    found = {}
    for path in files:
        for key, span in tensor_spans(path).items():
            parts = (target_name(key, prefixes) or "").split(".")
            start = next((place for place, part in enumerate(parts) if part in IMAGE_MODULES), None)
            if start is not None:
                found[".".join(parts[start:])] = path, span
    return found


def _preparation(config: PreTrainedConfig, image_processor: BaseImageProcessor) -> object:
    """What features depend on besides weights: the config of the image modules, and the preparation of images."""
    frozen = {
        key: value for key, value in config.to_dict().items() if key.startswith("vision") or key == "qformer_config"
    }
    return _relevant({"format": FORMAT, "image_processor": image_processor.to_dict(), "config": frozen})


def _described(facts: object) -> bytes:
    return json.dumps(facts, sort_keys=True, default=str).encode()


def _relevant(value: object) -> object:
    if isinstance(value, dict):
        return {key: _relevant(entry) for key, entry in value.items() if key not in _IRRELEVANT}
    return [_relevant(entry) for entry in value] if isinstance(value, (list, tuple)) else value
