"""The `minigpt4` command, composed of the subcommands of all rooms; each imports what it needs when it runs."""

import os
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from transformers_minigpt4.bulk.commands import describe
from transformers_minigpt4.conversion.commands import convert, export, merge, verify
from transformers_minigpt4.curation.commands import COMMANDS as CURATION_COMMANDS
from transformers_minigpt4.data.commands import filter_cc3m, scienceqa
from transformers_minigpt4.demo.commands import demo, evaluate_demo
from transformers_minigpt4.evaluation import commands as evaluation
from transformers_minigpt4.evaluation.human_commands import COMMANDS as JUDGING_COMMANDS
from transformers_minigpt4.evaluation.scienceqa_commands import COMMANDS as SCIENCEQA_COMMANDS
from transformers_minigpt4.hub.commands import push
from transformers_minigpt4.inference.chat_commands import chat
from transformers_minigpt4.instruct.commands import COMMANDS as INSTRUCT_COMMANDS
from transformers_minigpt4.serving.serve_commands import serve
from transformers_minigpt4.serving.web_commands import web
from transformers_minigpt4.training.commands import RecipeCommand, TrainCommand, features, train
from transformers_minigpt4.training.data_commands import check
from transformers_minigpt4.utils.command_line import Command, Group, to_stdout_in_utf8
from transformers_minigpt4.utils.interrupts import INTERRUPTED, finish, handle_interrupts


def main() -> None:
    """Runs the `minigpt4` command and exits with its status."""
    handle_interrupts()
    to_stdout_in_utf8()
    try:
        app()
    except SystemExit as exit_:
        finish(exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None))
        if exit_.code == INTERRUPTED:
            # Python would wait at exit for the threads that still hang on a slow download.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


def env() -> None:
    """
    Show versions and devices, for a bug report.

    Examples:
        minigpt4 env
    """
    import torch

    from transformers_minigpt4.utils.versions import CORE_PACKAGES, package_versions

    rows = package_versions((*CORE_PACKAGES, "huggingface_hub", "pillow"))
    rows["platform"] = platform.platform()
    rows["cpu count"] = str(os.cpu_count())
    rows["cuda"] = str(torch.version.cuda or "not in this build of torch")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    rows["device"] = str(accelerator) if accelerator is not None else "cpu"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    for name, value in rows.items():
        typer.echo(f"{name}: {value}")


class MainGroup(Group):
    """The subcommands by what they are for."""

    panels = {
        "Use": ("demo", "describe", "chat", "web", "serve", "convert", "verify", "export", "env"),
        "Train": ("train", "features", "merge"),
        "Data": ("data", "curate", "instruct"),
        "Evaluate": ("evaluate",),
        "Publish": ("push",),
    }


app = typer.Typer(
    name="minigpt4",
    cls=MainGroup,
    help="MiniGPT-4 for Hugging Face transformers.\n\nExamples:\n  minigpt4 demo\n  minigpt4 describe photo.jpg",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from transformers_minigpt4.utils.versions import package_version

        typer.echo(package_version("transformers_minigpt4"))
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show library messages and the trace of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    context.obj = debug


def _add_group(
    name: str,
    help: str,
    commands: Mapping[str, Callable[..., None]],
    cls: type[Group] = Group,
    parent: typer.Typer = app,
) -> typer.Typer:
    group = typer.Typer(cls=cls, help=help, no_args_is_help=True, rich_markup_mode=None)
    group.callback()(lambda: None)  # so that a group of one command stays a group
    for command_name, function in commands.items():
        group.command(command_name, cls=Command)(function)
    parent.add_typer(group, name=name)
    return group


for command in (demo, describe, chat, web, serve, convert, verify, export, env, merge, push):
    app.command(cls=Command)(command)
app.command(cls=TrainCommand)(train)
app.command(cls=RecipeCommand)(features)
_add_group(
    "data",
    "Inspect and convert training data.\n\nExamples:\n  minigpt4 data check cc_sbu_align:/data/cc_sbu_align",
    {"check": check, "scienceqa": scienceqa, "filter-cc3m": filter_cc3m},
)
_add_group(
    "curate",
    """Build a stage-2 dataset from images: describe, repair, review.

    Examples:
      minigpt4 curate init my-curation --source photos --checkpoint my-stage1 --images 50
      minigpt4 curate run my-curation
    """,
    CURATION_COMMANDS,
)
_add_group(
    "instruct",
    """Make instruction data from captions and boxes.

    Examples:
      minigpt4 instruct init my-data --captions photos.jsonl --model llama-3.1-8b --base-url http://127.0.0.1:8000/v1
      minigpt4 instruct generate my-data --dry-run
    """,
    INSTRUCT_COMMANDS,
)
evaluate_group = _add_group(
    "evaluate",
    """Evaluate a checkpoint.

    `evaluate CHECKPOINT ...` is short for `evaluate run CHECKPOINT ...`; `minigpt4 evaluate run --help` lists the
    options.

    Examples:
      minigpt4 evaluate my-checkpoint --tasks gqa,chair --data path/to/evaluation-data
      minigpt4 evaluate --demo
    """,
    {**evaluation.COMMANDS, "demo": evaluate_demo},
    evaluation.EvaluateGroup,
)
_add_group(
    "people",
    """Have people judge answers without knowing which model gave them.

    The answers are those to the task `advanced`.

    Examples:
      minigpt4 evaluate people make results/minigpt4-7b results/blip2 --output people
      minigpt4 evaluate people judge people
    """,
    JUDGING_COMMANDS,
    parent=evaluate_group,
)
_add_group(
    "scienceqa",
    """ScienceQA with a text-only language model.

    Examples:
      minigpt4 evaluate scienceqa text --release /data/scienceqa --output gpt4.jsonl --judge gpt-4
      minigpt4 evaluate scienceqa ensemble own.jsonl gpt4.jsonl --release /data/scienceqa --output ensemble
    """,
    SCIENCEQA_COMMANDS,
    parent=evaluate_group,
)


if __name__ == "__main__":
    main()
