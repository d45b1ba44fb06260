"""The `train` and `features` subcommands of `minigpt4`: run a recipe, or encode its images."""

import logging
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from typer.core import CompletionItem

from transformers_minigpt4.utils.command_line import (
    ClickContext,
    ClickFormatter,
    Command,
    DryRun,
    complain,
    this_command,
    usage_errors,
)

from .recipe_files import find_recipe, recipe_names
from .recipe_keys import KEYS


if TYPE_CHECKING:
    from .arguments import StageConfig


# It warns, whenever it is imported, of a kernel for weights of 4 bits on CPUs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class RecipeCommand(Command):
    """A command of a recipe, of which every key is an option; help lists the usual ones."""

    key_groups: tuple[str, ...] = ("Model and data", "Speed and memory")

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # Typer leaves the keys of recipes to TRL's parser.
        self.context_settings = {"allow_extra_args": True, "ignore_unknown_options": True}

    def format_options(self, ctx: ClickContext, formatter: ClickFormatter) -> None:
        """Writes arguments, options, and the keys of recipes with TRL's defaults."""
        super().format_options(ctx, formatter)
        for title in self.key_groups:
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (
                            f"{key.option} {key.metavar}",
                            key.help + ("" if key.default in (None, []) else f"  [default: {_shown(key.default)}]"),
                        )
                        for key in KEYS[title]
                    ]
                )

    def when_stopped(self) -> str:
        """What Ctrl-C says."""
        return f"stopped; the features so far are kept, `{this_command()}` resumes"

    def shell_complete(self, ctx: ClickContext, incomplete: str) -> list[CompletionItem]:
        """Completes options, the keys of recipes among them."""
        keys = [key for title in self.key_groups for key in KEYS[title] if key.option.startswith(incomplete)]
        found = super().shell_complete(ctx, incomplete)
        return found + [CompletionItem(key.option, help=key.help) for key in keys if incomplete.startswith("-")]


class TrainCommand(RecipeCommand):
    """`train`, whose help lists the keys of all groups."""

    key_groups = tuple(KEYS)

    def when_stopped(self) -> str:
        """What Ctrl-C says."""
        resume = this_command("--resume-from-checkpoint", "true")
        return f"stopped; `{resume}` resumes from the last checkpoint, or starts again if there is none"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _list_recipes(wanted: bool) -> None:
    if not wanted:
        return
    for name in recipe_names():
        with open(find_recipe(name), encoding="utf-8") as file:
            typer.echo(f"{name}: {file.readline().lstrip('# ').strip()}")
    raise typer.Exit


def _show_all_keys(wanted: bool) -> None:
    if not wanted:
        return
    from .recipe import GROUPS, RecipeParser

    typer.echo(RecipeParser(GROUPS, prog="minigpt4 train RECIPE").format_help())
    raise typer.Exit


Recipe: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of one of the package's recipes.",
        autocompletion=lambda incomplete: [name for name in recipe_names() if name.startswith(incomplete)],
    ),
]


def train(
    context: typer.Context,
    recipe: Recipe,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe with the options given here, ready to save.")
    ] = False,
    dry_run: DryRun = False,
    list_recipes: Annotated[
        bool,
        typer.Option(
            "--list-recipes", help="List the package's recipes, and exit.", callback=_list_recipes, is_eager=True
        ),
    ] = False,
    help_all: Annotated[
        bool,
        typer.Option(
            "--help-all",
            help="List every key, those of TRL included, and exit.",
            callback=_show_all_keys,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """
    Train one stage from a recipe.

    Every key of the recipe can be overridden; options follow the recipe. If interrupted, rerun the command with
    --resume-from-checkpoint true to resume. A dry run loads rows and model, checks that they fit, and prints the first
    row as tokens, with the learned ones marked. For several devices:
    `accelerate launch -m transformers_minigpt4.training.sft --config RECIPE`.

    Examples:
        minigpt4 train minigpt4_stage2 --model my-stage1 --sources cc_sbu_align:path/to/cc_sbu_align
        minigpt4 train tiny --output my-run --dry-run
    """
    words = _words(recipe, context.args)
    from .recipe import parse_recipe, resolved_recipe

    with usage_errors(context):
        if show:
            typer.echo(resolved_recipe(words), nl=False)
            return
        arguments = parse_recipe(words)
    if dry_run:
        _say_changes(arguments[1])
        from .dry_run import first_row, print_row

        print_row(first_row(*arguments))
        return
    from .sft import main

    main(*arguments, recipe=recipe)


def features(context: typer.Context, recipe: Recipe) -> None:
    """
    Cache the image features of a recipe for faster training.

    Each image is encoded once, and training needs no vision tower. Every key of the recipe can be overridden, as with
    `train`; --feature-cache names the folder. If interrupted, rerun the same command to resume; with more sources it
    adds the missing features. Then train with the same --feature-cache.

    Examples:
        minigpt4 features minigpt4_stage2 --model my-stage1 --feature-cache features
    """
    words = _words(recipe, context.args)
    from .feature_building import build_features
    from .recipe import parse_recipe

    with usage_errors(context):
        stage, config, model_args = parse_recipe(words)
    _say_changes(config)
    counts = build_features(stage, config, model_args)
    encoded, present, broken = (counts[kind] for kind in ("encoded", "present", "broken"))
    done = f"{encoded} images encoded, {present} already cached, {broken} unreadable"
    typer.echo(f"{done}; the features are in {stage.feature_cache}", err=True)


def _say_changes(config: "StageConfig") -> None:
    from .cpu_settings import changes_line

    if config.changes:
        complain(changes_line(config.changes, config.without_gpu))


def _words(recipe: str, options: list[str]) -> list[str]:
    """The words of a command line as TRL's parser takes them."""
    if recipe.startswith("-"):
        raise typer.BadParameter(
            f"options follow the recipe; give its file or name before {recipe}", param_hint="RECIPE"
        )
    return ["--config", recipe, *options]
