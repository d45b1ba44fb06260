"""
Trains one stage from a recipe: parse, load, train, save.

    python -m transformers_minigpt4.training.sft --config minigpt4_stage2 --output OUTPUT_DIR
    accelerate launch -m transformers_minigpt4.training.sft --config minigpt4_stage1
"""

import contextlib

from transformers.trainer_utils import set_seed
from trl import ModelConfig

from .arguments import StageArguments, StageConfig
from .checkpoints import run_lock
from .loading import load_model, load_rows
from .recipe import parse_recipe
from .setup import make_trainer, save_final


def main(stage: StageArguments, config: StageConfig, model_args: ModelConfig) -> None:
    """Runs a recipe from the beginning to the end, or from its last checkpoint."""
    set_seed(config.seed)
    # One process holds the lock for all processes of the run.
    with run_lock(str(config.output_dir)) if config.process_index == 0 else contextlib.nullcontext():
        rows = load_rows(stage, config)  # first, since a wrong path should not wait for a large model
        model, processor = load_model(stage, config, model_args)
        trainer = make_trainer(stage, config, model_args, model, processor, rows)
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        save_final(trainer, model_args.model_revision)
        trainer.end()


if __name__ == "__main__":
    main(*parse_recipe())
