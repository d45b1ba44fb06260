"""Compares a model with the tensors of its checkpoint: before memory is allocated, and after loading."""

import copy
from collections.abc import Collection, Mapping
from math import prod
from typing import TypeAlias

import torch
from transformers import PreTrainedModel

from .config_checks_minigpt4 import config_file, reason
from .configuration_minigpt4 import MiniGPT4Config
from .trained_modules_minigpt4 import PathLike, TensorSlice


LoadingInfo: TypeAlias = dict[str, Collection[str]]
_BUILD_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def check_fits(
    model_class: type[PreTrainedModel],
    config: MiniGPT4Config,
    tensors: Mapping[str, torch.Tensor | TensorSlice],
    name: PathLike,
    ignore_mismatched_sizes: bool = False,
    image_modules: bool = True,
) -> None:
    """
    Compares the shapes that a config describes with those in a checkpoint's files, without memory for either.

    transformers makes room for what is missing before it complains: 10,000 layers in a config of four take all memory.

    Args:
        model_class (`type`): The class to load.
        config (`MiniGPT4Config`): The checkpoint's.
        tensors (`Mapping`): Its tensors, or slices of its files, by name.
        name (`str` or `os.PathLike`): The checkpoint, for messages.
        ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`): Accept other shapes, as transformers does.
        image_modules (`bool`, *optional*, defaults to `True`): See [`MiniGPT4Model`].

    Raises:
        ValueError: for a config that no model can be built from, for tensors of other shapes, and for missing ones.
    """
    try:
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config), image_modules=image_modules)
    except _BUILD_ERRORS as error:
        raise ValueError(
            f"{config_file(name)}: no model can be built with these values ({reason(error)}). Copy config.json again "
            "from where the checkpoint came from."
        ) from error
    tied = getattr(model, "_tied_weights_keys", None) or {}
    expected = {
        key: tuple(tensor.shape)
        for key, tensor in model.named_parameters()
        if not (config.tie_word_embeddings and key in tied)
    }
    shapes = {key: _shape(tensor) for key, tensor in tensors.items()}
    found = {key: shapes.get(key, shapes.get(f"{model.base_model_prefix}.{key}")) for key in expected}
    wrong = [
        f"{key} has shape {list(shape)}, not {list(expected[key])}"
        for key, shape in found.items()
        if shape is not None and shape != expected[key]
    ]
    if wrong and not ignore_mismatched_sizes:
        more = f"; so have {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"{name}: the weights do not have the shapes that config.json describes: {wrong[0]}{more}. Take weights "
            "and config of one model."
        )
    # Files may have other names for the same tensors (experts, old versions), but not fewer numbers.
    if sum(map(prod, expected.values())) > sum(map(prod, shapes.values())):
        missing = [key for key, shape in found.items() if shape is None]
        if missing:
            raise ValueError(_misfit(model_class, name, {"missing_keys": missing, "unexpected_keys": ()}))


def check_complete(model_class: type[PreTrainedModel], name: PathLike | None, info: LoadingInfo) -> None:
    """
    Refuses a loaded model in which parameters are missing, or for which there were others.

    Raises:
        ValueError: with their names.
    """
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(_misfit(model_class, name, info))


def _misfit(model_class: type[PreTrainedModel], name: PathLike | None, info: LoadingInfo) -> str:
    problems = [
        f"{len(info[kind])} {words} ({', '.join(sorted(info[kind])[:5])}{', …' if len(info[kind]) > 5 else ''})"
        for kind, words in (("missing_keys", "missing"), ("unexpected_keys", "that the model does not have"))
        if info[kind]
    ]
    return (
        f"The checkpoint {name} does not fit {model_class.__name__} with its config: parameters "
        f"{' and '.join(problems)}. Take weights and config of one model, or convert the weights first."
    )


def _shape(tensor: torch.Tensor | TensorSlice) -> tuple[int, ...]:
    return tuple(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())
