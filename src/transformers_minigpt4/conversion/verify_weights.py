"""Checks of the weights themselves: as recorded, as in their source, and as trained weights are."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from transformers_minigpt4.modeling.trained_modules_minigpt4 import TensorSlice, target_name
from transformers_minigpt4.utils.file_names import WEIGHTS_FILE

from .checks import Check, Model, Processor
from .key_maps import POST_LAYERNORM, shorten
from .weight_record import (
    PARTS,
    PIXEL_SETTINGS,
    WeightRecord,
    deviations,
    known_sources,
    load_record,
    part_of,
    restricted,
)
from .weights import find_file


Tensors = Mapping[str, torch.Tensor | TensorSlice]

# Relative to the recorded values: rounding to bfloat16 changes them by 0.004, other values of the same size by 1.4.
# The matrices of the demo's Q-Former move by up to 0.54 in 400 steps of training at a high rate.
_CHANGED, _REPLACED = 0.02, 0.75
# Share of the matrices of a part that training moves: all of them, or those of a language model that LoRA chose.
_MOVED = {"language model": 0.1}
_MOVED_ELSEWHERE = 0.9
# A third of a fused bias that is this much smaller than the others is the keys': softmax does not depend on it, so
# training leaves it where it started, at zero.
_UNUSED = 0.1
_MIN_WIDTH = 80  # of what is judged by its numbers alone; in narrower matrices chance decides too much
_VISION = ("vision tower", "Q-Former", "projector")
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
# Mean and deviation that a tower was trained with, by model type; of EVA-CLIP there is only one.
_PIXELS = {
    "blip_2_vision_model": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip_vision_model": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "siglip2_vision_model": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "dinov3_vit": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
}


def check_finite(model: Model) -> Check:
    """Looks for infinities, NaNs, and matrices of zeros, in the weights as they were loaded."""
    broken, empty = [], []
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        # A sum would overflow, and a mask of all values would take as much memory again.
        rows = parameter.detach().reshape(-1).split(2**24)
        if not all(bool(torch.isfinite(part).all()) for part in rows):
            broken.append(name)
        elif parameter.ndim > 1 and "mask_token" not in name and not any(bool(part.any()) for part in rows):
            empty.append(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    if broken:
        advice = (
            "the file is damaged, or fp16 could not hold the values; convert again, with --dtype bfloat16 or float32"
        )
        return Check("finite weights", "fail", f"{len(broken)} tensors with inf or nan: {shorten(broken, 3)}", advice)
    if empty:
        advice = "tensors of zeros were never loaded or trained; convert again"
        return Check("finite weights", "fail", f"{len(empty)} tensors of zeros: {shorten(empty, 3)}", advice)
    return Check("finite weights", "ok", f"{count / 1e9:.2f} B parameters" if count > 1e8 else f"{count:,} parameters")


def records_of(checkpoint: str, config: PreTrainedConfig, trained: Collection[str]) -> list[WeightRecord]:
    """
    The records of a checkpoint, or of the bases of its trained modules, without what was trained since.

    Raises:
        OSError: for a record that is damaged.
    """
    bases = getattr(config, "base_checkpoints", None) or []
    places = [(base["name_or_path"], base["revision"], base["prefixes"]) for base in bases]
    records = []
    for place, revision, prefixes in places or [(checkpoint, None, {"": ""})]:
        path = find_file(place, WEIGHTS_FILE, revision)
        if path is None:
            continue
        record = load_record(Path(path))
        names = {name: target_name(name, prefixes) for name in record.values}
        # Places depend on the tensor's name in its own folder, so that a renamed tensor has no sample here.
        kept = {name for name, target in names.items() if target == name and name not in trained}
        records.append(restricted(record, kept))
    return records


def untrained_parts(records: list[WeightRecord], tensors: Tensors, trained: Collection[str]) -> set[str]:
    """
    Parts that `convert` drew at random, and that are still as it left them; also a new projector without record.

    Args:
        records: What `records_of` gave.
        tensors: All tensors by name.
        trained: Names of the parameters that the config says were trained; the parts they belong to are not returned.
    """
    recorded = {part_of(name) for record in records for name in record.values}
    found = {"projector"} if "projector" not in recorded and _is_new_projector(tensors) else set()
    for record in records:
        changed = {part_of(name) for name, far in deviations(record, tensors).items() if far > _CHANGED}
        present = {part_of(name) for name in record.values}
        found |= {part for part in record.fresh if part in present and part not in changed}
    return found - {part_of(name) for name in trained}


def _is_new_projector(tensors: Tensors) -> bool:
    """Whether the projector has the uniform distribution of a new `nn.Linear`, within 1 / sqrt(inputs)."""
    weights = [tensors[name][:] for name in tensors if part_of(name) == "projector" and name.endswith("weight")]
    if not weights or not all(weight.is_floating_point() for weight in weights):
        return False
    spread = [weight.float() * weight.shape[1] ** 0.5 for weight in weights]
    return all(0.98 < values.abs().max() < 1.01 and abs(values.std() - 3**-0.5) < 0.02 for values in spread)


def check_record(records: list[WeightRecord], tensors: Tensors, trained: Collection[str] = ()) -> Check:
    """
    Compares the weights with the record of their folder, and with the sources that this package knows.

    Args:
        records: What `records_of` gave.
        tensors: All tensors by name.
        trained: Names of those that were trained since.
    """
    name, compared = "recorded weights", 0
    problems: list[str] = []
    notes: list[str] = []
    for record in records:
        found = deviations(record, tensors)
        compared += len(found)
        lost = [tensor for tensor in record.values if tensor not in tensors]
        _judge(record, "its record", found, lost, problems, notes)
    fresh = {part for record in records for part in record.fresh}
    for source, record in known_sources().items():
        names_here = {tensor for tensor in record.values if _is_from_source(tensor, fresh, tensors)}
        record = restricted(record, names_here.difference(trained))
        found = deviations(record, tensors)
        names = {part: [tensor for tensor in record.values if part_of(tensor) == part] for part in PARTS}
        same = {part: sum(found.get(t, 1) <= _CHANGED for t in tensors_) for part, tensors_ in names.items()}
        if any(tensors_ and same[part] >= len(tensors_) / 2 for part, tensors_ in names.items()):
            compared = max(compared, len(found))
            here = {part_of(tensor) for tensor in tensors}
            # A part of another shape is another part; a layer that is missing is not.
            lost = [t for t in record.values if t not in tensors and part_of(t) in here and _fits(t, found)]
            _judge(record, source, found, lost, problems, notes)
    if problems:
        advice = "damaged, or put in the wrong place, since it was recorded; convert again from the sources"
        return Check(name, "fail", "; ".join(dict.fromkeys(problems)), advice)
    if notes:
        advice = "as training does; if you did not train this part, convert again"
        return Check(name, "warn", "; ".join(dict.fromkeys(notes)), advice)
    if not compared:
        advice = f"there is no {WEIGHTS_FILE}; checkpoints that `minigpt4 convert` writes have one"
        return Check(name, "skip", "no record to compare with", advice)
    return Check(name, "ok", f"{compared} tensors are those that were recorded")


def _is_from_source(name: str, fresh: set[str], tensors: Tensors) -> bool:
    """Whether a tensor is neither one that `convert` draws, nor the LayerNorm that comes with the Q-Former."""
    has_qformer = "Q-Former" not in fresh and any(part_of(other) == "Q-Former" for other in tensors)
    return part_of(name) not in fresh and (has_qformer or not name.startswith(POST_LAYERNORM))


def _fits(name: str, found: dict[str, float]) -> bool:
    """Whether most other tensors of the same part have the shapes of the source."""
    return any(part_of(other) == part_of(name) for other in found)


def _judge(
    record: WeightRecord,
    source: str,
    found: dict[str, float],
    lost: list[str],
    problems: list[str],
    notes: list[str],
) -> None:
    """Sorts the deviations of each part: none, those of further training, or damage."""
    for part in PARTS:
        far = {name: value for name, value in found.items() if part_of(name) == part}
        changed = [name for name, value in far.items() if value > _CHANGED]
        missing = [name for name in lost if part_of(name) == part]
        if (not changed and not missing) or part in record.fresh:
            continue
        matrices = [name for name in far if len(record.values[name][0]) > 1]
        moved = [name for name in matrices if far[name] > _CHANGED]
        gentle = bool(moved) and max(far[name] for name in moved) < _REPLACED
        everywhere = len(moved) >= _MOVED.get(part, _MOVED_ELSEWHERE) * len(matrices)
        if gentle and everywhere and not missing:
            notes.append(f"{part}: {len(changed)} of {len(far)} tensors moved away from {source}")
        else:
            worst = sorted(changed, key=lambda name: -far[name]) + missing
            problems.append(
                f"{part}: {len(changed) + len(missing)} of {len(far) + len(missing)} tensors are not those of "
                f"{source} ({shorten(worst, 2)})"
            )


def check_trained(
    tensors: Tensors, config: PreTrainedConfig, records: list[WeightRecord], untrained: set[str]
) -> Check:
    """
    Tells trained weights from random numbers, and from those whose norms, biases or order were lost.

    The largest singular value of an m x n matrix of independent numbers with deviation s is s (sqrt(m) + sqrt(n)),
    up to a relative error of about min(m, n)^(-2/3) (Marchenko and Pastur; Tracy and Widom). Training adds directions
    that are stronger. Parts that began as random numbers here are left out: few steps leave them close to those.
    """
    name, problems, details = "trained weights", [], []
    fresh = {"projector", *(part for record in records for part in record.fresh)}
    for part in _VISION:
        chosen = {key: value for key, value in tensors.items() if part_of(key) == part}
        if part in untrained:
            details.append(f"{part} untrained")
            continue
        if part not in fresh and (ratios := _ratios(chosen)):
            details.append(f"{part} {_median([ratio for ratio, _ in ratios.values()]):.2f}")
            problems += _random_layers(part, ratios)
        problems += _lost_vectors(part, chosen)
    weight = tensors.get(POST_LAYERNORM + "weight")
    if getattr(config, "qformer_config", None) is not None and "Q-Former" not in fresh and weight is not None:
        bias = tensors[POST_LAYERNORM + "bias"][:]
        if bool((weight[:] == 1).all()) and not bool(bias.any()):
            problems.append(f"{POST_LAYERNORM}* is a new LayerNorm, not the ln_vision trained with the Q-Former")
    problems += _wrong_roles(tensors, untrained)
    if problems:
        return Check(name, "fail", "; ".join(problems), "these weights were never trained or loaded; convert again")
    if not details:
        return Check(name, "skip", "too narrow, or quantized, to tell trained weights from random numbers")
    return Check(name, "ok", f"largest singular values, of random numbers 1.00: {', '.join(details)}")


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _ratios(tensors: Tensors) -> dict[str, tuple[float, float]]:
    """The largest singular value of each matrix relative to random numbers', and what these reach at most."""
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith("weight") or ("embeddings." in name and "patch_embedding" not in name):
            continue
        values = tensor[:]
        if values.ndim < 2 or not values.is_floating_point():
            continue
        matrix = values.reshape(len(values), -1).float()
        if min(matrix.shape) < _MIN_WIDTH:
            continue
        matrix = matrix - matrix.mean()
        scale = matrix.std(unbiased=False) * sum(side**0.5 for side in matrix.shape)
        found[name] = ((_largest(matrix) / scale).item(), 1 + min(matrix.shape) ** (-2 / 3)) if scale else (0.0, 1.0)
    return found


def _largest(matrix: torch.Tensor) -> torch.Tensor:
    """The largest singular value, by power iteration: a lower bound within a percent or two."""
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    for _ in range(30):
        vector = matrix.T @ (matrix @ torch.nn.functional.normalize(vector, dim=0))
    return vector.norm().sqrt()


def _random_layers(part: str, ratios: dict[str, tuple[float, float]]) -> list[str]:
    typical = _median([ratio for ratio, _ in ratios.values()])
    if typical <= _median([edge for _, edge in ratios.values()]):
        return [f"{part}: its matrices are random numbers ({typical:.2f})"]
    layers: dict[str, list[bool]] = {}
    for name, (ratio, edge) in ratios.items():
        if match := re.search(r"layers?\.\d+", name):
            layers.setdefault(match[0], []).append(ratio <= edge)
    return [f"{part}: {layer} is random numbers" for layer, random in layers.items() if all(random)]


def _lost_vectors(part: str, tensors: Tensors) -> list[str]:
    """Norms that are all one, and biases that are all zero, of a part that has several."""
    vectors = {name: tensor[:] for name, tensor in tensors.items() if name.endswith(("weight", "bias"))}
    vectors = {
        name: vector
        for name, vector in vectors.items()
        if vector.ndim == 1 and vector.is_floating_point() and len(vector) >= _MIN_WIDTH
    }
    norms = [vector for name, vector in vectors.items() if name.endswith("weight")]
    biases = [vector for name, vector in vectors.items() if name.endswith("bias")]
    problems = []
    if len(norms) > 2 and all(bool((vector == 1).all()) for vector in norms):
        problems.append(f"{part}: the weights of all {len(norms)} norms are one")
    is_enough = len(biases) > 2 or part == "projector"
    if biases and is_enough and not any(bool(vector.any()) for vector in biases):
        problems.append(f"{part}: its biases are zero ({len(biases)})")
    return problems


def _wrong_roles(tensors: Tensors, untrained: set[str]) -> list[str]:
    """Attention whose query or value has the bias that only a key can have, close to zero."""
    wrong: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = part_of(name)
        if part not in _VISION or part in untrained:
            continue
        if name.endswith("qkv.bias"):
            query, key, value = (third.float().norm().item() for third in tensor[:].chunk(3))
        elif re.search(r"\.(key|k_proj)\.bias$", name):
            siblings = [re.sub(r"(key|k_proj)(?=\.bias$)", other, name) for other in _siblings(name)]
            if not all(sibling in tensors for sibling in siblings):
                continue
            query, value = (tensors[sibling][:].float().norm().item() for sibling in siblings)
            key = tensor[:].float().norm().item()
        else:
            continue
        if min(query, value) < _UNUSED * key and min(query, value) < _UNUSED * max(query, value):
            wrong[part] = wrong.get(part, 0) + 1
    return [
        f"{part}: in {count} attention layers the bias of query or value is near zero, as only a key's can be: query, "
        "key and value are in another order"
        for part, count in wrong.items()
    ]


def _siblings(name: str) -> tuple[str, str]:
    return ("query", "value") if ".key." in name else ("q_proj", "v_proj")


def check_pixels(config: PreTrainedConfig, processor: Processor, records: list[WeightRecord]) -> Check:
    """Compares what the image processor does to values with the record, or with what the tower was trained with."""
    name, settings = "image processor", processor.image_processor
    now = {key: getattr(settings, key, None) for key in PIXEL_SETTINGS}
    tower = config.vision_config.model_type
    recorded = next((record.pixels for record in records if record.pixels), None)
    expected = recorded or {**_PIXELS.get(tower, {}), "do_rescale": True}
    if not recorded and tower in _PIXELS:
        expected["do_normalize"] = True
    wrong = [f"{key} is {now[key]}, not {value}" for key, value in expected.items() if not _alike(now[key], value)]
    if wrong:
        advice = "the tower sees other colors than it was trained with; take its own image processor, or convert again"
        is_certain = recorded or tower == "blip_2_vision_model" or not now["do_rescale"]
        return Check(name, "fail" if is_certain else "warn", "; ".join(wrong), advice)
    if not recorded and tower not in _PIXELS:
        return Check(name, "skip", f"mean and deviation of a {tower!r} tower are not known here")
    return Check(name, "ok", f"mean and deviation are those of {'the record' if recorded else tower}")


def _alike(now: object, expected: object) -> bool:
    if isinstance(expected, list) and isinstance(now, (list, tuple)):
        return len(now) == len(expected) and all(abs(a - b) < 1e-3 for a, b in zip(now, expected))
    if isinstance(expected, float) and isinstance(now, (int, float)):
        return abs(now - expected) < 1e-3 * abs(expected)
    return now == expected


__all__ = ["check_finite", "check_pixels", "check_record", "check_trained", "records_of", "untrained_parts"]
