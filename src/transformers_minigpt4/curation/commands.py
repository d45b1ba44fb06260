"""The `curate` subcommands of `minigpt4`: build a stage-2 dataset, step by step or in one run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transformers_minigpt4.hub import commands as hub
from transformers_minigpt4.utils.command_line import DryRun, EngineOption, Host, Port, Seed

from .project_commands import (
    Decided,
    Export,
    Import,
    NewProject,
    ProjectPath,
    Reviewer,
    Unreviewed,
    absolute,
    check_review_options,
    opened,
    review_project,
    write_settings,
)


if TYPE_CHECKING:
    from .store import Project


def init(
    project: NewProject,
    source: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="Where images come from: a folder, KIND:PATH (docs/reference/formats.md) or python:MODULE:FUNCTION.",
        ),
    ],
    checkpoint: Annotated[
        str, typer.Option(metavar="CHECKPOINT", help="Folder or Hub id of the model that describes them.")
    ],
    images: Annotated[int, typer.Option(min=1, help="Number of images to sample.")] = 5000,
    seed: Seed = 42,
    repair_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Language model that repairs the texts: its name at the endpoint, or a folder or Hub id.",
        ),
    ] = None,
    repair_base_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="OpenAI-compatible endpoint. By default the repair model is loaded locally."),
    ] = None,
) -> None:
    """
    Create a project folder; its curation.yaml holds every setting.

    Edit the settings before the first step.

    Examples:
        minigpt4 curate init my-curation --source photos --checkpoint my-stage1 --images 50
    """
    from transformers_minigpt4.llm.types import ChatSettings

    from .config import SETTINGS, CurationConfig

    if repair_base_url is not None and repair_model is None:
        raise ValueError("--repair-base-url needs --repair-model, the model's name at that endpoint")
    config = CurationConfig(
        source=absolute(source),
        checkpoint=absolute(checkpoint),
        images=images,
        seed=seed,
        repair=ChatSettings(repair_model, repair_base_url) if repair_model is not None else None,
    )
    path = write_settings(project, SETTINGS, config)
    typer.echo(f"settings in {path}; edit them, then: minigpt4 curate run {project}")


def generate(project: ProjectPath, engine: EngineOption = "transformers") -> None:
    """
    Sample images and describe them with the checkpoint.

    Examples:
        minigpt4 curate generate my-curation
        minigpt4 curate generate my-curation --engine vllm
    """
    from .generate import run_generate

    with _opened(project, create=True) as found:
        typer.echo(str(run_generate(found, found.config, engine=engine)), err=True)


def repair(project: ProjectPath) -> None:
    """
    Have a language model repair the descriptions.

    Texts that fail are tried again by the next call. The exit status is 1 if every text failed.

    Examples:
        minigpt4 curate repair my-curation
    """
    from .repair import run_repair

    with _opened(project) as found:
        summary = run_repair(found, found.config)
        typer.echo(str(summary), err=True)
        summary.check()


def filter_texts(project: ProjectPath) -> None:
    """
    Drop failed descriptions by rules, and record the reasons.

    Examples:
        minigpt4 curate filter my-curation
    """
    from .filter import run_filter

    with _opened(project) as found:
        typer.echo(str(run_filter(found, found.config)), err=True)


def review(
    project: ProjectPath,
    export: Export = None,
    import_from: Import = None,
    decided: Decided = False,
    reviewer: Reviewer = None,
    host: Host = "127.0.0.1",
    port: Port = None,
) -> None:
    """
    Accept, edit or reject pairs on a local web page or in a file.

    Several people can review at once. The page runs until Ctrl-C; every decision is saved as it is made. The exit
    status is 0 if every pair has been decided on, else 130.

    Examples:
        minigpt4 curate review my-curation
        minigpt4 curate review my-curation --export pending.csv
    """
    check_review_options(export, import_from, decided)
    with _opened(project) as found:
        review_project(found, export, import_from, decided, reviewer, host, port)


def build(
    project: ProjectPath,
    unreviewed: Unreviewed = None,
) -> None:
    """
    Write the accepted pairs as a dataset with a card.

    It is written twice: for `datasets`, and as the authors' cc_sbu_align folder.

    Examples:
        minigpt4 curate build my-curation
    """
    from .build import run_build

    with _opened(project) as found:
        typer.echo(str(run_build(found, found.config, unreviewed=unreviewed)), err=True)


def push(
    project: ProjectPath,
    repo_id: hub.RepoId,
    license_id: hub.LicenseId = None,
    license_name: hub.LicenseName = None,
    license_link: hub.LicenseLink = None,
    private: hub.Private = False,
    revision: hub.Revision = None,
    message: hub.Message = None,
    dry_run: DryRun = False,
) -> None:
    """
    Publish the built dataset on the Hugging Face Hub.

    Examples:
        minigpt4 curate push my-curation my-name/my-set --license cc-by-4.0 --dry-run
    """
    from .build import built_dataset

    with _opened(project) as found:
        folder = built_dataset(found)
    hub.push(
        folder,
        repo_id,
        license_id=license_id,
        license_name=license_name,
        license_link=license_link,
        private=private,
        revision=revision,
        message=message,
        dry_run=dry_run,
    )


def run(project: ProjectPath) -> None:
    """
    Run all steps except review and push.

    These are generate, repair, filter, report, and build if anything was accepted.
    If interrupted, rerun the same command to resume. After a setting has changed, it redoes what the setting affects.

    Examples:
        minigpt4 curate run my-curation
    """
    from .run import run_all

    with _opened(project, create=True) as found:
        run_all(found, found.config, say=typer.echo)


def status(
    project: ProjectPath,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="PNG file for a chart of the funnel.")] = None,
) -> None:
    """
    Show how many pairs reached each step, and why others did not.

    Examples:
        minigpt4 curate status my-curation --output funnel.png
    """
    from .status import save_status_png, status_text

    with _opened(project) as found:
        typer.echo(status_text(found))
        if output is not None:
            save_status_png(found, output)
            typer.echo(f"funnel in {output}", err=True)


def report(
    project: ProjectPath,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="HTML file. By default report.html in the project's folder.")
    ] = None,
) -> None:
    """
    Write an HTML page with the funnel, text lengths and samples.

    Samples show the images and texts behind every reason.

    Examples:
        minigpt4 curate report my-curation
    """
    from .report import run_report

    with _opened(project) as found:
        typer.echo(str(run_report(found, found.config, output)))


# In the order of their use.
COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "generate": generate,
    "repair": repair,
    "filter": filter_texts,
    "review": review,
    "build": build,
    "push": push,
    "run": run,
    "status": status,
    "report": report,
}


def _opened(where: Path, create: bool = False) -> "AbstractContextManager[Project]":
    from .store import Project

    return opened(Project, where, create)
