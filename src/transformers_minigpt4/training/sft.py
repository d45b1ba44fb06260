"""Trains one stage from a recipe: load, prepare, train, save, push. Also `python -m` and `accelerate launch -m`."""

import os
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

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

    return TrlParser((StageArguments, StageConfig, ModelConfig), allow_abbrev=False)


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
    stage, config, model_args = make_parser().parse_args_and_config(arguments)
    check_arguments(stage, config, model_args)
    return stage, config, model_args


def load_model(stage: StageArguments, config: StageConfig, model_args: Any):
    """The model and its processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from trl import get_quantization_config

    import transformers_minigpt4  # noqa: F401  registers MiniGPT-4 with the Auto classes

    name = model_args.model_name_or_path
    source = {"revision": model_args.model_revision, "trust_remote_code": config.trust_remote_code}
    if name.startswith(PYTHON):
        name = _made_model(name, config)
    check_model(stage, AutoConfig.from_pretrained(name, **source), name)
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        # The tower is small and its features decide; TRL's fused loss reads the head's weight itself.
        quantization.llm_int8_skip_modules = ["model.vision_tower", "lm_head"]
    placed: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
    if quantization and config.device.type == "cuda":
        placed["device_map"] = {"": config.local_process_index}  # quantised weights cannot be moved later
    model = AutoModelForImageTextToText.from_pretrained(
        name, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation, **placed, **source
    )
    return model, AutoProcessor.from_pretrained(name, **source)


def load_rows(stage: StageArguments, config: StageConfig) -> tuple[Any, str | None]:
    """The rows, and a digest of where they come from."""
    if stage.sources[0].startswith(PYTHON):
        return _function(stage.sources[0])(config.max_steps * config.train_batch_size, config.seed), None
    from transformers_minigpt4.data.sources import open_rows

    rows = open_rows(
        stage.sources,
        stage.form,  # type: ignore[arg-type]
        seed=config.seed,
        min_shards=config.world_size * max(1, config.dataloader_num_workers),
        max_bad_share=stage.max_bad_share,
    )
    return rows.dataset, rows.fingerprint


def make_trainer(stage: StageArguments, config: StageConfig, model_args: Any, model, processor, rows):
    """The prepared trainer; `SFTTrainer`, or `Trainer` for a model with its own loss."""
    from transformers.trainer_utils import set_seed
    from trl import get_peft_config

    from .collator import make_collator
    from .guards import GuardCallback
    from .record import RunRecordCallback, run_record
    from .stages import prepare_stage, trainable_parameters
    from .trainer import StageSFTTrainer, StageTrainer

    set_seed(config.seed)  # adapters are drawn at random
    prepare_stage(model, stage.train_parts)
    keywords: dict[str, Any] = {
        "model": model,
        "args": config,
        "train_dataset": rows[0],
        "data_collator": make_collator(model, processor, stage.max_completion_length),
        "processing_class": processor,
    }
    if model.config.model_type == "blip-2":
        trainer: Any = StageTrainer(**keywords)
    else:
        trainer = StageSFTTrainer(**keywords, peft_config=_adapters(get_peft_config(model_args), stage))
    trainer.add_callback(GuardCallback(stage.check_first_loss))
    record = run_record([stage, config, model_args], rows[0], trainable_parameters(trainer.model))
    if rows[1] is not None:
        record["data_fingerprint"] = rows[1]
    trainer.add_callback(RunRecordCallback(record))
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
    if config.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


def save_final(trainer: Any) -> None:
    """Leaves a checkpoint in the output folder that loads by its name: trained parts of MiniGPT-4, else the whole."""
    from ..modeling.modeling_minigpt4 import MiniGPT4PreTrainedModel

    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, MiniGPT4PreTrainedModel) or hasattr(model, "peft_config"):
        trainer.save_model()
        return
    from transformers import Trainer

    if trainer.args.should_save:
        Trainer._save(trainer, trainer.args.output_dir)
    trainer.accelerator.wait_for_everyone()


def _adapters(peft_config: Any, stage: StageArguments) -> Any:
    """PEFT freezes what is not an adapter; the other parts of the stage train as a whole and are saved with them."""
    if peft_config is None:
        return None
    modules = {"projection": ["multi_modal_projector"], "qformer": ["qformer"]}
    chosen = [name for part in stage.train_parts for name in modules.get(part, [])]
    peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *chosen] or None
    # `q_proj` and `v_proj` occur in vision towers too, which stay frozen.
    targets = peft_config.target_modules
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
