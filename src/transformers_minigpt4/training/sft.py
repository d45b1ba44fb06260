"""Trains one stage from a recipe: load, prepare, train, save. Also `python -m` and `accelerate launch -m`."""

import os
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .arguments import PYTHON, StageArguments, StageConfig, check_arguments, check_model


RECIPES = files(__package__) / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(Path(str(path)).stem for path in RECIPES.iterdir() if str(path).endswith(".yaml"))


def find_recipe(name: str) -> str:
    """
    The file of a recipe, by path or by the name of one that comes with the package.

    Raises:
        ValueError: for one that does not exist.
    """
    if os.path.isfile(name):
        return name
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"There is no recipe {name}. Give a YAML file, or one of {', '.join(recipe_names())}.")
    return str(path)


def make_parser():
    """The parser of recipes and command lines: `StageArguments`, `StageConfig` and TRL's `ModelConfig`."""
    from trl import ModelConfig, TrlParser

    class RecipeParser(TrlParser):
        def error(self, message: str):  # argparse would print all keys and leave
            raise ValueError(f"{message[:1].upper()}{message[1:]}. Set it right in the recipe or on the command line.")

    return RecipeParser((StageArguments, StageConfig, ModelConfig), allow_abbrev=False)


def parse_recipe(arguments: list[str] | None = None) -> tuple[StageArguments, StageConfig, Any]:
    """
    Reads `--config RECIPE` and what the command line sets beside it.

    Raises:
        ValueError: for a key that does not exist, and for options that exclude each other.
    """
    import sys

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--config" in arguments:
        place = arguments.index("--config") + 1
        arguments[place] = find_recipe(arguments[place])
    parser = make_parser()
    try:
        stage, config, model_args, rest = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe is no YAML: {' '.join(str(error).split())}.") from error
    if rest:
        unknown = [word.lstrip("-").partition("=")[0] for word in rest if word.startswith("--")]
        near = get_close_matches(unknown[0], {action.dest for action in parser._actions}, 1) if unknown else []
        raise ValueError(
            f"Unknown in a recipe or on its command line: {' '.join(rest)}. "
            + (f"Did you mean {near[0]}? " if near else "")
            + "Keys are those of TRL's SFTConfig and ModelConfig, and of this package's training/arguments.py."
        )
    check_arguments(stage, config, model_args)
    return stage, config, model_args


def load_model(stage: StageArguments, config: StageConfig, model_args: Any):
    """
    The model and its processor; with `feature_cache` without its vision tower, after a check that the cache fits.

    Raises:
        DataError: for a cache of other weights, or made in another way.
        ValueError: for a model that is not there, or that the recipe was not written for.
    """
    from transformers import AutoModelForImageTextToText

    from .features import FeatureCache
    from .optimizations import load_towerless

    name, model_config, processor, keywords = _loading(stage, config, model_args)
    if stage.feature_cache is None:
        return AutoModelForImageTextToText.from_pretrained(name, **keywords), processor
    FeatureCache(stage.feature_cache, source=_source(name, model_config, processor, model_args))
    return load_towerless(model_config.model_type, name, **keywords), processor


def _loading(stage: StageArguments, config: StageConfig, model_args: Any):
    """Name, config and processor of a recipe's model, and how `from_pretrained` shall load it."""
    from transformers import AutoConfig, AutoProcessor
    from trl import get_quantization_config

    import transformers_minigpt4  # noqa: F401  registers MiniGPT-4 with the Auto classes

    from .optimizations import TOWERS

    name = model_args.model_name_or_path
    source = {"revision": model_args.model_revision, "trust_remote_code": config.trust_remote_code}
    if name.startswith(PYTHON):
        name = _made_model(name, config)
    try:
        model_config = AutoConfig.from_pretrained(name, **source)
    except OSError as error:
        if os.path.isdir(name):
            raise
        cure = (
            "Train stage 1 first, and set" if stage.requires_stage1 else "Compose it with `minigpt4 convert`, or set"
        )
        raise ValueError(
            f"model_name_or_path={name} is no folder here, and the Hub gives no model of that name "
            f"({str(error).splitlines()[0].rstrip('.')}). {cure} model_name_or_path to where it is."
        ) from error
    check_model(stage, model_config, name)
    if stage.feature_cache is not None and model_config.model_type not in TOWERS:
        raise ValueError(
            f"{name} is a {model_config.model_type}, and features are kept for {' and '.join(TOWERS)} alone. Leave "
            "out feature_cache."
        )
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        # The tower is small and its features decide; TRL's fused loss reads the head's weight itself.
        quantization.llm_int8_skip_modules = ["model.vision_tower", "lm_head"]
    placed: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
    if quantization and config.device.type == "cuda":
        placed["device_map"] = {"": config.local_process_index}  # quantised weights cannot be moved later
    attention = model_args.attn_implementation
    keywords = {"dtype": model_args.dtype, "attn_implementation": attention, **placed, **source}
    return name, model_config, AutoProcessor.from_pretrained(name, **source), keywords


def _source(name: str, model_config: Any, processor: Any, model_args: Any) -> str:
    """Digest of the tower's files, and of what decides on its weights in memory besides."""
    from .optimizations import source_digest

    dtype = model_config.dtype if model_args.dtype in (None, "auto") else model_args.dtype
    quantized = model_args.load_in_4bit, model_args.load_in_8bit
    how = {"dtype": str(dtype).removeprefix("torch."), "quantized": quantized}
    return source_digest(name, model_config, processor.image_processor, how, model_args.model_revision)


class LoadedRows(NamedTuple):
    """A recipe's rows, a digest of where they come from, and what was wrong with others."""

    dataset: Any
    fingerprint: str | None = None
    problems: Any = None


def load_rows(stage: StageArguments, config: StageConfig) -> LoadedRows:
    """The rows that a recipe names."""
    from transformers_minigpt4.data.sources import open_rows

    from .features import FeatureCache

    features = FeatureCache(stage.feature_cache) if stage.feature_cache is not None else None
    if stage.sources[0].startswith(PYTHON):
        return LoadedRows(_called_rows(stage, config))
    rows = open_rows(
        stage.sources,
        stage.form,  # type: ignore[arg-type]
        seed=config.seed,
        min_shards=config.world_size * max(1, config.dataloader_num_workers),
        max_error_rate=stage.max_error_rate,
        features=features,
    )
    return LoadedRows(rows.dataset, rows.fingerprint, rows.problems)


def _called_rows(stage: StageArguments, config: StageConfig) -> Any:
    return _function(stage.sources[0])(config.max_steps * config.train_batch_size, config.seed)


def build_features(stage: StageArguments, config: StageConfig, model_args: Any) -> dict[str, int]:
    """
    Fills the recipe's `feature_cache` with its pictures, those that it lacks.

    Returns:
        `dict[str, int]`: Pictures `encoded` now, `present` before, and `broken` ones.

    Raises:
        ValueError: for a recipe without `feature_cache`, or one that cannot use it.
        DataError: for a folder that was built with other weights, and for a source without usable rows.
    """
    from transformers import AutoModelForImageTextToText

    from .features import build_feature_cache
    from .stages import prepare_stage

    if stage.feature_cache is None:
        raise ValueError("The recipe names no place for features. Set --feature_cache FOLDER.")
    name, model_config, processor, keywords = _loading(stage, config, model_args)
    digest = _source(name, model_config, processor, model_args)
    images = _images(stage, config)
    model = AutoModelForImageTextToText.from_pretrained(name, **keywords)
    prepare_stage(model, stage.trainable_modules)
    if not getattr(model, "is_quantized", False):
        model.to(config.device)
    return build_feature_cache(model, processor.image_processor, images, stage.feature_cache, source=digest)


def _images(stage: StageArguments, config: StageConfig) -> Iterator[Any]:
    """Every picture of the sources, as training has them."""
    from transformers_minigpt4.data.sources import open_rows

    if stage.sources[0].startswith(PYTHON):
        datasets = [_called_rows(stage, config)]
    else:
        options: dict[str, Any] = {"shuffle": False, "passes": 1, "decode": False, "max_error_rate": None}
        datasets = [open_rows(source, stage.form, **options).dataset for source in stage.sources]  # type: ignore[arg-type]
    for dataset in datasets:
        for row in dataset:
            yield from [row["image"]] if row.get("image") is not None else row.get("images") or []


def make_trainer(stage: StageArguments, config: StageConfig, model_args: Any, model, processor, rows: LoadedRows):
    """The prepared trainer; `SFTTrainer`, or `Trainer` for a model with its own loss."""
    from transformers.trainer_utils import set_seed
    from trl import get_peft_config

    from .collator import make_collator
    from .optimizations import shorten
    from .run_info import RunInfoCallback, run_info
    from .sanity_checks import SanityCheckCallback
    from .stages import prepare_stage, trainable_parameters
    from .trainer import StageSFTTrainer, StageTrainer

    set_seed(config.seed)  # adapters are drawn at random
    prepare_stage(model, stage.trainable_modules)
    collator = make_collator(model, processor, stage.max_completion_length)
    keywords: dict[str, Any] = {
        "model": model,
        "args": config,
        "train_dataset": rows.dataset,
        "data_collator": shorten(stage, config, model, processor, collator),
        "processing_class": processor,
    }
    if model.config.model_type == "blip-2":
        trainer: Any = StageTrainer(**keywords)
    else:
        trainer = StageSFTTrainer(**keywords, peft_config=_adapters(get_peft_config(model_args), stage))
    trainer.add_callback(SanityCheckCallback(stage.check_first_loss))
    record = run_info([stage, config, model_args], rows.dataset, trainable_parameters(trainer.model))
    if rows.fingerprint is not None:
        record["data_fingerprint"] = rows.fingerprint
    trainer.add_callback(RunInfoCallback(record, rows.problems))
    return trainer


def main(stage: StageArguments, config: StageConfig, model_args: Any) -> None:
    """Runs a recipe from beginning to end, or from its last checkpoint on."""
    from transformers.trainer_utils import set_seed

    set_seed(config.seed)
    rows = load_rows(stage, config)  # first, since a wrong path should not wait for a large model
    model, processor = load_model(stage, config, model_args)
    trainer = make_trainer(stage, config, model_args, model, processor, rows)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    save_final(trainer)
    trainer.end()


def save_final(trainer: Any) -> None:
    """Leaves a checkpoint in the output folder that loads by its name: trained parts of MiniGPT-4, else the whole."""
    from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4PreTrainedModel

    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, MiniGPT4PreTrainedModel) or hasattr(model, "peft_config"):
        trainer.save_model()
        return
    from transformers import Trainer

    from .optimizations import has_tower, restore_tower

    if not has_tower(model):
        restore_tower(model)
    if trainer.args.should_save:
        Trainer._save(trainer, trainer.args.output_dir)
    trainer.accelerator.wait_for_everyone()


def _adapters(peft_config: Any, stage: StageArguments) -> Any:
    """PEFT freezes what is not an adapter; the other parts of the stage train as a whole and are saved with them."""
    if peft_config is None:
        return None
    modules = {"projector": ["multi_modal_projector"], "qformer": ["qformer"]}
    chosen = [name for part in stage.trainable_modules for name in modules.get(part, [])]
    peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *chosen] or None
    # `q_proj` and `v_proj` occur in vision towers too, which stay frozen.
    targets = peft_config.target_modules
    if isinstance(targets, str) and targets.isidentifier():  # TRL hands on one name without its list
        targets = [targets]
    if isinstance(targets, (list, set)) and targets:
        names = "|".join(sorted(targets))
        peft_config.target_modules = rf".*language_model.*\.({names})"
    return peft_config


def _function(name: str) -> Any:
    """What `python:MODULE:FUNCTION` names."""
    module, _, function = name.removeprefix(PYTHON).partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} names no function ({error}). Write {PYTHON}MODULE:FUNCTION.") from error


def _made_model(name: str, config: StageConfig) -> str:
    """Saves the model that a function makes of the seed, once, so that trained parts have a base to stand on."""
    folder = Path(config.output_dir) / "base"
    if config.process_index == 0 and not folder.is_dir():
        model, processor = _function(name)(config.seed)
        scratch = folder.with_name(".base")
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        os.replace(scratch, folder)
    config.distributed_state.wait_for_everyone()
    return str(folder)


if __name__ == "__main__":
    main(*parse_recipe())
