"""
Trains one stage from a recipe: parse, load, train, save.

    python -m transformers_minigpt4.training.sft --config minigpt4_stage2 --output OUTPUT_DIR
    accelerate launch -m transformers_minigpt4.training.sft --config minigpt4_stage1
"""

import contextlib
import os
import sys
from itertools import pairwise

from transformers.trainer_utils import set_seed
from trl import ModelConfig

from transformers_minigpt4.utils.command_line import complain
from transformers_minigpt4.utils.interrupts import INTERRUPTED

from .arguments import StageArguments, StageConfig
from .checkpoints import is_finished, record_finished, resolve_resume, run_lock
from .cpu_settings import changes_line
from .loading import load_model, load_rows
from .next_commands import commands_after
from .progress import print_facts
from .recipe import parse_recipe
from .run_info import recipe_settings
from .run_page import PAGE
from .setup import make_trainer, save_final


def main(stage: StageArguments, config: StageConfig, model_args: ModelConfig, recipe: str | None = None) -> None:
    """
    Runs a recipe from the beginning to the end, or from its last checkpoint; one that has been run says so.

    Args:
        stage (`StageArguments`), config (`StageConfig`), model_args (`ModelConfig`): Of [`parse_recipe`].
        recipe (`str`, *optional*): Name or file of the recipe, to name the command that comes next.
    """
    set_seed(config.seed)
    output = str(config.output_dir)
    if config.changes and config.process_index == 0:
        print(changes_line(config.changes, config.without_gpu), flush=True)
    rows = load_rows(stage, config)  # first, since a wrong path should not wait for a large model
    if is_finished(config, recipe_settings([stage, config, model_args])):
        if config.process_index == 0:
            print_facts([("complete", f"all {config.max_steps:,} steps were trained already, nothing is left to do")])
            _print_next(stage, output, recipe)
        return
    # One process holds the lock for all processes of the run.
    with run_lock(output) if config.process_index == 0 else contextlib.nullcontext():
        checkpoint = resolve_resume(output, config.resume_from_checkpoint)
        model, processor = load_model(stage, config, model_args)
        trainer = make_trainer(stage, config, model_args, model, processor, rows)
        trainer.train(resume_from_checkpoint=checkpoint)
        save_final(trainer, model_args.model_revision)
        if config.process_index == 0:
            record_finished(output, trainer.state)
        trainer.end()
    if config.process_index == 0:
        _print_next(stage, output, recipe)


def _print_next(stage: StageArguments, output: str, recipe: str | None) -> None:
    commands = commands_after(recipe, stage.prompt_format, output)
    print_facts(
        [("checkpoint", output), ("curves", os.path.join(output, PAGE)), *(("next", command) for command in commands)]
    )


def _run() -> None:
    """Runs the recipe of the command line, which `accelerate launch` gives to several processes."""
    try:
        recipe = next((value for option, value in pairwise(sys.argv) if option == "--config"), None)
        main(*parse_recipe(), recipe=recipe)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            complain("stopped; the same command with --resume_from_checkpoint true resumes from the last checkpoint")
            sys.stderr.flush()
        os._exit(INTERRUPTED)  # other processes may never answer what this one would wait for


if __name__ == "__main__":
    _run()
