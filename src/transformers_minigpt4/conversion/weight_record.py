"""A record of a checkpoint's weights: sixteen values of each tensor, which any later damage changes."""

import json
import math
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transformers_minigpt4.modeling.trained_modules_minigpt4 import LazyTensors, TensorSlice
from transformers_minigpt4.utils.file_names import WEIGHTS_FILE

from .key_maps import HEAD, LANGUAGE, PROJECTOR, QFORMER, QUERIES, TOWER


PARTS = {
    "vision tower": (TOWER,),
    "Q-Former": (QFORMER,),
    "queries": (QUERIES,),
    "projector": (PROJECTOR,),
    "language model": (LANGUAGE, HEAD),
}
# What an image processor does to an image, as far as its values go.
PIXEL_SETTINGS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
# Which features of the tower the projector was made for.
FEATURE_SETTINGS = ("vision_feature_layer", "vision_feature_select_strategy")
KNOWN_SOURCES = Path(__file__).with_name("known_sources.json")
_ROWS, _COLUMNS = 8, 2  # values of a tensor that are recorded: two of each of eight rows


@dataclass
class WeightRecord:
    """
    Values of each tensor of a checkpoint.

    Args:
        values: Shape and sampled values of each tensor, by name.
        fresh: Parts of `PARTS` that were drawn at random, to be trained.
        pixels: `PIXEL_SETTINGS` of the image processor.
        features: `FEATURE_SETTINGS` of the config, for LLaVA.
    """

    values: dict[str, tuple[tuple[int, ...], list[float]]]
    fresh: tuple[str, ...] = ()
    pixels: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)


def part_of(name: str) -> str | None:
    """The part of `PARTS` that a tensor belongs to."""
    return next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), None)


def sample(tensor: torch.Tensor | TensorSlice, shape: tuple[int, ...], name: str) -> list[float]:
    """Values at places that depend only on the tensor's name and shape; only their rows are read from a file."""
    draw, width = random.Random(f"{name}{shape}"), math.prod(shape[1:])
    if len(shape) == 1:
        values = tensor[:]
        return [float(values[draw.randrange(shape[0])]) for _ in range(_ROWS * _COLUMNS)]
    sampled: list[float] = []
    for row in (draw.randrange(shape[0]) for _ in range(_ROWS)):
        values = tensor[row : row + 1].reshape(-1)
        sampled += [float(values[draw.randrange(width)]) for _ in range(_COLUMNS)]
    return sampled


def shape_of(tensor: torch.Tensor | TensorSlice) -> tuple[int, ...]:
    return tuple(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())


def sample_all(tensors: Mapping[str, torch.Tensor | TensorSlice]) -> dict[str, tuple[tuple[int, ...], list[float]]]:
    """Shapes and values of tensors, without scalars."""
    shapes = {name: shape_of(tensor) for name, tensor in tensors.items()}
    return {
        name: (shape, sample(tensors[name], shape, name)) for name, shape in shapes.items() if math.prod(shape) > 1
    }


def save_record(folder: Path, fresh: Iterable[str] = ()) -> None:
    """Writes the record of a complete checkpoint into its folder."""
    values = sample_all(LazyTensors(sorted(folder.glob("*.safetensors"))))
    processor = folder / "processor_config.json"
    found = json.loads(processor.read_text(encoding="utf-8")).get("image_processor", {}) if processor.is_file() else {}
    pixels = {key: found[key] for key in PIXEL_SETTINGS if key in found}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    features = {key: config[key] for key in FEATURE_SETTINGS if key in config}
    record = WeightRecord(values, tuple(fresh), pixels, features)
    (folder / WEIGHTS_FILE).write_text(_dumps(record), encoding="utf-8")


def _dumps(record: WeightRecord) -> str:
    """JSON with one line a tensor."""
    rows = ",\n".join(
        f"{json.dumps(name)}: {json.dumps([list(shape), [float(f'{value:.6g}') for value in values]])}"
        for name, (shape, values) in record.values.items()
    )
    entries: dict[str, Any] = {"fresh": record.fresh, "image_processor": record.pixels}
    head = json.dumps({**entries, **({"features": record.features} if record.features else {})})
    return f'{head[:-1]},\n"tensors": {{\n{rows}\n}}}}\n'


def load_record(path: Path) -> WeightRecord:
    """
    Reads a record.

    Raises:
        OSError: for a file that is not one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        values = {name: (tuple(shape), list(map(float, row))) for name, (shape, row) in found["tensors"].items()}
        features = dict(found.get("features", {}))  # only LLaVA has them
        return WeightRecord(values, tuple(found["fresh"]), dict(found["image_processor"]), features)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{path} is damaged ({error!r}); convert the checkpoint again, or delete the file") from error


def deviations(record: WeightRecord, tensors: Mapping[str, torch.Tensor | TensorSlice]) -> dict[str, float]:
    """
    How far the sampled values of each tensor are from those recorded, relative to these.

    About 1.4 for other values of the same size, up to 0.004 after rounding to fewer bits. Quantized tensors and those
    of another shape are left out; rows that were appended do not count.
    """
    found = {}
    for name, (shape, values) in record.values.items():
        tensor = tensors.get(name)
        if tensor is None or (now := shape_of(tensor))[1:] != shape[1:] or now[0] < shape[0]:
            continue
        if not tensor[0:1].is_floating_point():
            continue
        distance = math.dist(sample(tensor, shape, name), values)
        size = math.hypot(*values)
        found[name] = distance / size if size else (0.0 if not distance else math.inf)
    return found


def known_sources() -> dict[str, WeightRecord]:
    """Records of parts that this package ships, by the name of their source."""
    found = json.loads(KNOWN_SOURCES.read_text(encoding="utf-8"))
    return {
        source: WeightRecord({name: (tuple(shape), values) for name, (shape, values) in tensors.items()})
        for source, tensors in found.items()
    }


def restricted(record: WeightRecord, names: Collection[str]) -> WeightRecord:
    """The record without tensors of other names."""
    values = {name: entry for name, entry in record.values.items() if name in names}
    return WeightRecord(values, record.fresh, record.pixels, record.features)
