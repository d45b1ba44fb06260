"""The `curate` subcommands of `minigpt4`: make a stage-2 set, step by step or in one run."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer


if TYPE_CHECKING:
    from .store import Project

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
_Where = Annotated[
    Path, typer.Argument(metavar="PROJECT", help="The project's folder, or its curation.yaml.", show_default=False)
]


def init(
    folder: Annotated[Path, typer.Argument(help="New folder for the project.")],
    source: Annotated[
        str,
        typer.Option(
            help="Where pictures come from: a folder of pictures, KIND:PATH as in docs/reference/formats.md, or "
            "python:MODULE:FUNCTION."
        ),
    ],
    checkpoint: Annotated[str, typer.Option(help="Folder or Hub id of the model that describes them.")],
    images: Annotated[int, typer.Option(min=1, help="How many are drawn.")] = 5000,
    seed: Annotated[int, typer.Option(min=0, help="Draws them.")] = 42,
    repair_model: Annotated[
        str | None, typer.Option(help="Language model that repairs: its name at the endpoint, or a folder or Hub id.")
    ] = None,
    repair_base_url: Annotated[
        str | None, typer.Option(help="Address of an OpenAI-compatible endpoint. Without it the model is loaded here.")
    ] = None,
) -> None:
    """
    Make a project: a folder with curation.yaml, which holds every setting, to be edited before the first step.
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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(commented_yaml(config))
    except FileExistsError:
        raise ValueError(f"{path} is there already; edit it, or choose another folder") from None
    typer.echo(f"settings in {path}; edit them, then: minigpt4 curate run {folder}")


def generate(project: _Where) -> None:
    """
    Draw pictures and describe them with the checkpoint.
    """
    from .generate import run_generate

    with _opened(project, create=True) as opened:
        typer.echo(str(run_generate(opened, opened.config)), err=True)


def repair(project: _Where) -> None:
    """
    Have a language model repair the descriptions.
    """
    from .repair import run_repair

    with _opened(project) as opened:
        typer.echo(str(run_repair(opened, opened.config)), err=True)


def filter_texts(project: _Where) -> None:
    """
    Drop what the rules know as failures, each with its reason.
    """
    from .filter import run_filter

    with _opened(project) as opened:
        typer.echo(str(run_filter(opened, opened.config)), err=True)


def review(
    project: _Where,
    export: Annotated[
        Path | None, typer.Option(help="Write the pairs that wait into this .csv or .jsonl file, and show no page.")
    ] = None,
    import_from: Annotated[
        Path | None, typer.Option("--import", help="Read decisions from this .csv or .jsonl file, and show no page.")
    ] = None,
    reviewer: Annotated[
        str | None, typer.Option(help="Whose decisions the file holds, where it does not say; on the page, ask there.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address at which the page listens.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="By default a free one from 7860 on.")] = None,
) -> None:
    """
    Let people accept, edit or reject each pair, on a local web page or by way of a file.

    Several people may review at once. The page runs until Ctrl-C; every decision is kept as it is made.
    """
    if export is not None and import_from is not None:
        raise ValueError("--export and --import are two steps; give one of them")
    with _opened(project) as opened:
        if export is not None:
            _export(opened, export, reviewer)
        elif import_from is not None:
            _import(opened, import_from, reviewer)
        else:
            _serve(opened, host, port)


def build(
    project: _Where,
    unreviewed: Annotated[
        bool | None,
        typer.Option(
            "--unreviewed/--reviewed", help="Whether to take also what nobody has reviewed. By default the setting."
        ),
    ] = None,
) -> None:
    """
    Write the accepted pairs as a data set and as the authors' cc_sbu_align folder, with a card.
    """
    from .build import run_build

    with _opened(project) as opened:
        typer.echo(str(run_build(opened, opened.config, unreviewed=unreviewed)), err=True)


def push(
    project: _Where,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="namespace/name on the Hub.")],
    license_id: Annotated[
        str | None, typer.Option("--license", help="The Hub's identifier of the pictures' and texts' licence.")
    ] = None,
    license_name: Annotated[str | None, typer.Option(help="Name of the licence, with --license other.")] = None,
    license_link: Annotated[str | None, typer.Option(help="URL of its text, with --license other.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch. By default main.")] = None,
    message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files, sizes and card, and do not touch the network.")
    ] = False,
) -> None:
    """
    Publish what build has written on the Hugging Face Hub.
    """
    from transformers_minigpt4.hub.commands import push as push_folder

    from .build import built_dataset

    with _opened(project) as opened:
        folder = built_dataset(opened)
    push_folder(
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


def run(config: _Where) -> None:
    """
    Run all steps but review: generate, repair, filter, report, and build where there is something to build from.

    Stopped or broken off, the same command goes on where it was. After a changed setting it does again what that
    affects.
    """
    from .run import run_all

    with _opened(config, create=True) as opened:
        run_all(opened, opened.config, say=typer.echo)


def status(
    project: _Where,
    png: Annotated[Path | None, typer.Option(help="Draw the funnel into this PNG file too.")] = None,
) -> None:
    """
    Show how many pairs came to each step, what became of them, and why.
    """
    from .status import save_status_png, status_text

    with _opened(project) as opened:
        typer.echo(status_text(opened))
        if png is not None:
            save_status_png(opened, png)
            typer.echo(f"funnel in {png}", err=True)


def report(
    project: _Where,
    output: Annotated[Path | None, typer.Option(help="By default report.html in the project's folder.")] = None,
) -> None:
    """
    Write a page with the funnel, lengths before and after, and samples of every reason with their pictures.
    """
    from .report import run_report

    with _opened(project) as opened:
        typer.echo(str(run_report(opened, opened.config, output)))


# In the order of their use. The command line gives each its own class of command.
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
    """The project of a folder or of a `curation.yaml`; Ctrl-C ends the command with what to do next."""
    from .config import CONFIG_FILE, CurationError
    from .store import Project

    if where.is_file() and where.name != CONFIG_FILE:
        raise CurationError(
            f"{where} is no project: settings are in a file {CONFIG_FILE}, and its folder is the project's"
        )
    folder = where.parent if where.name == CONFIG_FILE and not where.is_dir() else where
    with Project.create(folder) if create else Project.open(folder) as project:
        try:
            yield project
        except KeyboardInterrupt as interrupt:
            typer.echo("minigpt4: stopped; what was finished is kept, and the same command goes on", err=True)
            raise typer.Exit(INTERRUPTED) from interrupt


def _absolute(name: str) -> str:
    """A folder's full path, so that the project works from any folder; all else, such as a Hub id, as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def _export(project: "Project", path: Path, reviewer: str | None) -> None:
    from .review_files import export_pairs

    found = export_pairs(project, path, reviewer)
    typer.echo(f"{found.pairs:,} pairs that wait in {path}; fill in action: accept, edit or reject", err=True)
    for key in found.missing:
        typer.echo(f"left out, because its picture is gone: {key}", err=True)


def _import(project: "Project", path: Path, reviewer: str | None) -> None:
    from .review_files import import_decisions

    found = import_decisions(project, path, reviewer)
    typer.echo(
        f"{found.added:,} decisions: {found.accepted:,} accepted, {found.edited:,} edited, {found.rejected:,} "
        f"rejected; {found.known:,} were known, {found.undecided:,} rows are without one",
        err=True,
    )


def _serve(project: "Project", host: str, port: int | None) -> None:
    from .review_page import serve_review

    with serve_review(project, host, port) as server:
        typer.echo(f"review at {server.url} (Ctrl-C ends it; every decision is kept as it is made)")
        server.wait()
