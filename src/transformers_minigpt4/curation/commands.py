"""The `curate` subcommands of `minigpt4`: build a stage-2 dataset, step by step or in one run."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from transformers_minigpt4.hub import commands as hub
from transformers_minigpt4.utils.command_line import (
    INTERRUPTED,
    DryRun,
    Host,
    Port,
    Seed,
    complain,
    interruptible,
    this_command,
)


if TYPE_CHECKING:
    from .store import Project

ProjectPath: TypeAlias = Annotated[
    Path, typer.Argument(metavar="PROJECT", help="The project's folder, or its curation.yaml.", show_default=False)
]


def init(
    project: Annotated[Path, typer.Argument(metavar="PROJECT", help="New folder for the project.")],
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

    from .config import CONFIG_FILE, CurationConfig, commented_yaml

    if repair_base_url is not None and repair_model is None:
        raise ValueError("--repair-base-url needs --repair-model, the model's name at that endpoint")
    config = CurationConfig(
        source=_absolute(source),
        checkpoint=_absolute(checkpoint),
        images=images,
        seed=seed,
        repair=ChatSettings(repair_model, repair_base_url) if repair_model is not None else None,
    )
    project.mkdir(parents=True, exist_ok=True)
    path = project / CONFIG_FILE
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(commented_yaml(config))
    except FileExistsError:
        raise ValueError(f"{path} already exists; edit it, or choose another folder") from None
    typer.echo(f"settings in {path}; edit them, then: minigpt4 curate run {project}")


def generate(project: ProjectPath) -> None:
    """
    Sample images and describe them with the checkpoint.

    Examples:
        minigpt4 curate generate my-curation
    """
    from .generate import run_generate

    with _opened(project, create=True) as opened:
        typer.echo(str(run_generate(opened, opened.config)), err=True)


def repair(project: ProjectPath) -> None:
    """
    Have a language model repair the descriptions.

    Texts that fail are tried again by the next call. The exit status is 1 if every text failed.

    Examples:
        minigpt4 curate repair my-curation
    """
    from .repair import run_repair

    with _opened(project) as opened:
        summary = run_repair(opened, opened.config)
        typer.echo(str(summary), err=True)
        summary.check()


def filter_texts(project: ProjectPath) -> None:
    """
    Drop failed descriptions by rules, and record the reasons.

    Examples:
        minigpt4 curate filter my-curation
    """
    from .filter import run_filter

    with _opened(project) as opened:
        typer.echo(str(run_filter(opened, opened.config)), err=True)


def review(
    project: ProjectPath,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the pending pairs to this .csv or .jsonl file; opens no page."),
    ] = None,
    import_from: Annotated[
        Path | None,
        typer.Option("--import", metavar="FILE", help="Read decisions from this .csv or .jsonl file; opens no page."),
    ] = None,
    decided: Annotated[
        bool, typer.Option("--decided", help="With --export: write the decisions made so far, not the pending pairs.")
    ] = False,
    reviewer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose decisions the file holds, if it does not say. The page asks."),
    ] = None,
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
    if export is not None and import_from is not None:
        raise ValueError("--export and --import are two steps; give one of them")
    if decided and export is None:
        raise ValueError("--decided says what to export; give --export FILE too")
    with _opened(project) as opened:
        if export is not None:
            _export(opened, export, reviewer, decided)
        elif import_from is not None:
            _import(opened, import_from, reviewer)
        else:
            _serve(opened, host, port)


def build(
    project: ProjectPath,
    unreviewed: Annotated[
        bool | None,
        typer.Option(
            "--unreviewed/--reviewed", help="Whether to include unreviewed pairs. By default as in curation.yaml."
        ),
    ] = None,
) -> None:
    """
    Write the accepted pairs as a dataset with a card.

    It is written twice: for `datasets`, and as the authors' cc_sbu_align folder.

    Examples:
        minigpt4 curate build my-curation
    """
    from .build import run_build

    with _opened(project) as opened:
        typer.echo(str(run_build(opened, opened.config, unreviewed=unreviewed)), err=True)


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

    with _opened(project) as opened:
        folder = built_dataset(opened)
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

    with _opened(project, create=True) as opened:
        run_all(opened, opened.config, say=typer.echo)


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

    with _opened(project) as opened:
        typer.echo(status_text(opened))
        if output is not None:
            save_status_png(opened, output)
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

    with _opened(project) as opened:
        typer.echo(str(run_report(opened, opened.config, output)))


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


@contextlib.contextmanager
def _opened(where: Path, create: bool = False) -> Iterator["Project"]:
    """The project of a folder or of a `curation.yaml`; Ctrl-C ends the command and says how to resume."""
    from .config import CONFIG_FILE, CurationError
    from .store import Project

    if where.is_file() and where.name != CONFIG_FILE:
        raise CurationError(
            f"{where} is not a project: settings are in a file {CONFIG_FILE}, and its folder is the project"
        )
    folder = where.parent if where.name == CONFIG_FILE and not where.is_dir() else where
    message = f"stopped; everything finished so far is kept, `{this_command()}` resumes"
    with Project.create(folder) if create else Project.open(folder) as project, interruptible(message):
        yield project


def _absolute(name: str) -> str:
    """The full path of a folder, so that the project works from any folder; others, such as Hub ids, as they are."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def _export(project: "Project", path: Path, reviewer: str | None, decided: bool) -> None:
    from .review_files import export_pairs

    found = export_pairs(project, path, reviewer, decided)
    if decided:
        typer.echo(f"{found.pairs:,} decisions in {path}", err=True)
        return
    typer.echo(f"{found.pairs:,} pending pairs in {path}; fill in action: accept, edit or reject", err=True)
    for key in found.missing:
        typer.echo(f"omitted, because its image is gone: {key}", err=True)


def _import(project: "Project", path: Path, reviewer: str | None) -> None:
    from .review_files import import_decisions

    found = import_decisions(project, path, reviewer)
    typer.echo(
        f"{found.added:,} decisions: {found.accepted:,} accepted, {found.edited:,} edited, {found.rejected:,} "
        f"rejected; {found.known:,} were known, {found.undecided:,} rows without one",
        err=True,
    )


def _serve(project: "Project", host: str, port: int | None) -> None:
    from .review import ReviewQueue
    from .review_page import serve_review
    from .review_screen import what_next

    with serve_review(project, host, port) as server:
        typer.echo(f"review at {server.url} (Ctrl-C ends it; every decision is saved as it is made)")
        server.wait()
    progress = ReviewQueue(project).progress()
    complain(what_next(project.folder, progress))
    if progress.due:
        raise typer.Exit(INTERRUPTED)
