"""The `train` and `features` subcommands of `minigpt4`: run a recipe, or encode its pictures, in this process."""

import logging
from typing import Annotated

import typer


# It warns, whenever it is imported, of a kernel for weights of 4 bits on CPUs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# For `app.command(context_settings=…)`: every key of a recipe is an option, so typer leaves them alone.
CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe of the package.")
    ],
) -> None:
    """
    Train one stage from a recipe.

    Every key of the recipe can be set anew: `minigpt4 train minigpt4_stage2 --model_name_or_path out/stage1`. Stopped
    or broken off, `--resume_from_checkpoint true` goes on where the run was. For several devices:
    `accelerate launch -m transformers_minigpt4.training.sft --config RECIPE`.

    Examples:
        minigpt4 train minigpt4_stage2 --model_name_or_path my-stage1 --sources cc_sbu_align:path/to/cc_sbu_align
    """
    from .recipe import parse_recipe
    from .sft import main

    main(*parse_recipe(["--config", recipe, *context.args]))


def features(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe of the package.")
    ],
) -> None:
    """
    Encode the pictures of a recipe once, so that it trains without its vision tower.

    Every key of the recipe can be set anew, as with `train`; `--feature_cache FOLDER` says where features go. Stopped
    or broken off, the same command goes on with what lacks. Then: `minigpt4 train RECIPE --feature_cache FOLDER`.

    Examples:
        minigpt4 features minigpt4_stage2 --model_name_or_path my-stage1 --feature_cache features
    """
    from .feature_building import build_features
    from .recipe import parse_recipe

    stage, config, model_args = parse_recipe(["--config", recipe, *context.args])
    counts = build_features(stage, config, model_args)
    typer.echo(", ".join(f"{count} {what}" for what, count in counts.items()) + f" in {stage.feature_cache}", err=True)
