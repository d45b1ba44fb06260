"""What the commands of every kind of project share: opening it, its settings file, the review."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

from transformers_minigpt4.utils.command_line import INTERRUPTED, complain, interruptible, this_command


if TYPE_CHECKING:
    from .settings_file import SettingsFile
    from .store import AnyProject

    ProjectT = TypeVar("ProjectT", bound=AnyProject)

ProjectPath: TypeAlias = Annotated[
    Path, typer.Argument(metavar="PROJECT", help="The project's folder, or its settings file.", show_default=False)
]
NewProject: TypeAlias = Annotated[Path, typer.Argument(metavar="PROJECT", help="New folder for the project.")]
Export: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--export", metavar="FILE", help="Write the pending pairs to this .csv or .jsonl file; opens no page."
    ),
]
Import: TypeAlias = Annotated[
    Path | None,
    typer.Option("--import", metavar="FILE", help="Read decisions from this .csv or .jsonl file; opens no page."),
]
Decided: TypeAlias = Annotated[
    bool, typer.Option("--decided", help="With --export: write the decisions made so far, not the pending pairs.")
]
Reviewer: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--reviewer", metavar="NAME", help="Whose decisions the file holds, if it does not say. The page asks."
    ),
]

Unreviewed: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--unreviewed/--reviewed",
        help="Whether to include what nobody has reviewed. By default as in the settings file.",
    ),
]


@contextlib.contextmanager
def opened(kind: "type[ProjectT]", where: Path, create: bool = False) -> "Iterator[ProjectT]":
    """The project of a folder or of a settings file; Ctrl-C ends the command and says how to resume."""
    from .settings_file import CurationError

    name = kind.settings_file.name
    if where.is_file() and where.name != name:
        raise CurationError(f"{where} is not a project: settings are in a file {name}, and its folder is the project")
    folder = where.parent if where.name == name and not where.is_dir() else where
    message = f"stopped; everything finished so far is kept, `{this_command()}` resumes"
    with kind.create(folder) if create else kind.open(folder) as project, interruptible(message):
        yield project


def write_settings(folder: Path, file: "SettingsFile[Any]", config: Any) -> Path:
    """
    Writes the settings of a new project.

    Raises:
        ValueError: if it has settings already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file.name
    try:
        with open(path, "x", encoding="utf-8") as opened_file:
            opened_file.write(file.text(config))
    except FileExistsError:
        raise ValueError(f"{path} already exists; edit it, or choose another folder") from None
    return path


def absolute(name: str) -> str:
    """The full path of a file or folder, so that the project works from any folder; others, such as Hub ids, as is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def check_review_options(export: Path | None, import_from: Path | None, decided: bool) -> None:
    """
    Raises:
        ValueError: for options that do not go together.
    """
    if export is not None and import_from is not None:
        raise ValueError("--export and --import are two steps; give one of them")
    if decided and export is None:
        raise ValueError("--decided says what to export; give --export FILE too")


def review_project(
    project: "AnyProject",
    export: Path | None,
    import_from: Path | None,
    decided: bool,
    reviewer: str | None,
    host: str,
    port: int | None,
) -> None:
    """Exports pairs, imports decisions, or serves the page, as the options say."""
    if export is not None:
        _export(project, export, reviewer, decided)
    elif import_from is not None:
        _import(project, import_from, reviewer)
    else:
        _serve(project, host, port)


def _export(project: "AnyProject", path: Path, reviewer: str | None, decided: bool) -> None:
    from .review_files import export_pairs

    found = export_pairs(project, path, reviewer, decided)
    if decided:
        typer.echo(f"{found.pairs:,} decisions in {path}", err=True)
        return
    typer.echo(f"{found.pairs:,} pending pairs in {path}; fill in action: accept, edit or reject", err=True)
    for key in found.missing:
        typer.echo(f"omitted, because its image is gone: {key}", err=True)


def _import(project: "AnyProject", path: Path, reviewer: str | None) -> None:
    from .review_files import import_decisions

    found = import_decisions(project, path, reviewer)
    typer.echo(
        f"{found.added:,} decisions: {found.accepted:,} accepted, {found.edited:,} edited, {found.rejected:,} "
        f"rejected; {found.known:,} were known, {found.undecided:,} rows without one",
        err=True,
    )


def _serve(project: "AnyProject", host: str, port: int | None) -> None:
    from .review import ReviewQueue
    from .review_page import serve_review
    from .review_screen import what_next

    with serve_review(project, host, port) as server:
        typer.echo(f"review at {server.url} (Ctrl-C ends it; every decision is saved as it is made)")
        server.wait()
    progress = ReviewQueue(project).progress()
    complain(what_next(project, progress))
    if progress.due:
        raise typer.Exit(INTERRUPTED)
