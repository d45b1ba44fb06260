"""Loads what a recipe names: its rows, its model and processor, and the functions that make either."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from trl import ModelConfig, get_quantization_config

from transformers_minigpt4.data.held_out import Selection
from transformers_minigpt4.data.skipped_rows import SkippedRows
from transformers_minigpt4.data.sources import open_rows
from transformers_minigpt4.utils.checkpoint_files import loading_from
from transformers_minigpt4.utils.files import atomic_folder
from transformers_minigpt4.utils.text import first_line

from .arguments import PYTHON, StageArguments, StageConfig, check_model, steps_of_epochs
from .feature_cache import FeatureCache
from .fingerprints import source_digest
from .held_out import HeldOutRows, load_held_out, split_dataset
from .prompt_check import check_prompt_format, fit_processor
from .towerless import load_towerless


class LoadedRows(NamedTuple):
    """
    A recipe's rows, a digest of where they come from, counts of the skipped ones, rows of an epoch if known, and the
    rows that are held out.
    """

    dataset: Dataset | IterableDataset
    fingerprint: str | None = None
    skipped: SkippedRows | None = None
    length: int | None = None
    held_out: HeldOutRows = HeldOutRows([], [], True)


@dataclass(frozen=True)
class ModelSource:
    """
    Where a recipe's model comes from, before its weights are loaded.

    Args:
        name (`str`): Folder or Hub id.
        config (`PreTrainedConfig`): The checkpoint's.
        processor (`ProcessorMixin`): The checkpoint's.
        keywords (`dict`): For `from_pretrained`.
        digest (`str`, *optional*): Of the frozen image modules as they will be loaded, for a recipe with a feature
            cache; see [`source_digest`].
    """

    name: str
    config: PreTrainedConfig
    processor: ProcessorMixin
    keywords: dict[str, Any]
    digest: str | None = None


def load_rows(stage: StageArguments, config: StageConfig) -> LoadedRows:
    """
    The rows that a recipe names; `config.max_steps` becomes the steps of `num_train_epochs` where it is not set.

    Raises:
        DataError: for sources that cannot be opened, or one without a single usable row.
        ValueError: for a function that does not exist, and for epochs of sources whose length is not known.
    """
    features = FeatureCache(stage.feature_cache) if stage.feature_cache is not None else None
    if stage.sources[0].startswith(PYTHON):
        dataset, evaluation = call_for_rows(stage, config), None
        if config.eval_share is not None:
            dataset, evaluation = split_dataset(dataset, config.eval_share, config.eval_rows)
        held_out = load_held_out(stage, config, features, evaluation)
        return LoadedRows(dataset, length=len(dataset), held_out=held_out)
    rows = open_rows(
        stage.sources,
        stage.prompt_format,
        seed=config.seed,
        min_shards=config.world_size * max(1, config.dataloader_num_workers),
        max_error_rate=stage.max_error_rate,
        features=features,
        selection=None if config.eval_share is None else Selection(config.eval_share, held_out=False),
    )
    length = rows.length
    if length is not None and config.eval_share is not None:
        length = round(length * (1 - config.eval_share))  # which rows are held out is known when they have been read
    if config.max_steps <= 0:
        config.max_steps = steps_of_epochs(config, stage.sources, length)
    held_out = load_held_out(stage, config, features)
    return LoadedRows(rows.dataset, rows.fingerprint, rows.skipped, length, held_out)


def call_for_rows(stage: StageArguments, config: StageConfig) -> Dataset:
    """The rows of a source `python:MODULE:FUNCTION`: as many as the run takes, drawn by its seed."""
    return python_function(stage.sources[0])(config.max_steps * config.train_batch_size, config.seed)


def load_model(
    stage: StageArguments, config: StageConfig, model_args: ModelConfig
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    The model and its processor; with `feature_cache` without its vision tower, after a check that the cache fits.

    Raises:
        DataError: for a cache of other weights, or built in another way.
        ValueError: for a model that is not there, or that the recipe was not written for.
    """
    source = find_model(stage, config, model_args)
    if stage.feature_cache is not None:
        FeatureCache(stage.feature_cache, source=source.digest)
    with loading_from(source.name):
        if stage.feature_cache is None:
            return AutoModelForImageTextToText.from_pretrained(source.name, **source.keywords), source.processor
        return load_towerless(source.config, source.name, **source.keywords), source.processor


def find_model(stage: StageArguments, config: StageConfig, model_args: ModelConfig) -> ModelSource:
    """
    Finds and checks a recipe's model without loading its weights.

    Raises:
        ValueError: for a model that is not there, or that the recipe was not written for.
    """
    name = str(model_args.model_name_or_path)
    source: dict[str, Any] = {"revision": model_args.model_revision, "trust_remote_code": config.trust_remote_code}
    if name.startswith(PYTHON):
        name = _save_made_model(name, config)
    try:
        with loading_from(name):
            model_config = AutoConfig.from_pretrained(name, **source)
    except OSError as error:
        if os.path.isdir(name):
            raise
        cure = (
            "Train stage 1 first, and set" if stage.requires_stage1 else "Compose it with `minigpt4 convert`, or set"
        )
        raise ValueError(
            f"model_name_or_path={name} is not a folder here, and the Hub has no model of that name "
            f"({first_line(error)}). {cure} model_name_or_path to where it is."
        ) from error
    check_model(stage, model_config, name)
    with loading_from(name):
        processor = AutoProcessor.from_pretrained(name, **source)
    processor = fit_processor(stage.prompt_format, model_config, processor)
    if not stage.sources[0].startswith(PYTHON):  # rows of a function are in its own format
        check_prompt_format(stage.prompt_format, model_config, processor, name)
    digest = None if stage.feature_cache is None else _digest(name, model_config, processor, model_args)
    keywords = {
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        **_quantization(config, model_args),
        **source,
    }
    return ModelSource(name, model_config, processor, keywords, digest)


def _quantization(config: StageConfig, model_args: ModelConfig) -> dict[str, Any]:
    quantization = get_quantization_config(model_args)
    if quantization is None:
        return {}
    # The tower is small and its features decide; TRL's fused loss reads the head's weight itself.
    quantization.llm_int8_skip_modules = ["model.vision_tower", "lm_head"]
    keywords: dict[str, Any] = {"quantization_config": quantization}
    if config.device.type == "cuda":
        keywords["device_map"] = {"": config.local_process_index}  # quantized weights cannot be moved later
    return keywords


def _digest(name: str, config: PreTrainedConfig, processor: ProcessorMixin, model_args: ModelConfig) -> str:
    """Digest of the image modules' files, and of everything else that decides on their weights in memory."""
    dtype = config.dtype if model_args.dtype in (None, "auto") else model_args.dtype
    quantized = model_args.load_in_4bit, model_args.load_in_8bit
    how: dict[str, object] = {"dtype": str(dtype).removeprefix("torch."), "quantized": quantized}
    return source_digest(name, config, processor.image_processor, how, model_args.model_revision)


def python_function(name: str) -> Callable[..., Any]:
    """
    What `python:MODULE:FUNCTION` names.

    Raises:
        ValueError: for a module or a function that does not exist.
    """
    module, _, function = name.removeprefix(PYTHON).partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} names no function ({error}). Write {PYTHON}MODULE:FUNCTION.") from error


def _save_made_model(name: str, config: StageConfig) -> str:
    """Saves the model that a function makes from the seed, once, as the base of the trained checkpoints."""
    folder = Path(str(config.output_dir)) / "base"
    if config.process_index == 0 and not folder.is_dir():
        model, processor = python_function(name)(config.seed)
        with atomic_folder(folder) as scratch:
            model.save_pretrained(scratch)
            processor.save_pretrained(scratch)
    config.distributed_state.wait_for_everyone()
    return str(folder)
