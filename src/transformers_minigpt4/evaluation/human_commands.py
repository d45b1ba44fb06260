"""The `evaluate people` subcommands of `minigpt4`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from transformers_minigpt4.utils.command_line import Host, Port, Seed


SheetFolder: TypeAlias = Annotated[
    Path, typer.Argument(metavar="SHEET", help="Folder of a sheet made by `minigpt4 evaluate people make`.")
]


def make(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS...", help="Folders of results of the task `advanced`, one per model."),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the sheet.")],
    seed: Seed = 0,
) -> None:
    """
    Combine several models' answers into one shuffled, blind sheet.

    The sheet does not show which model gave an answer.

    Examples:
        minigpt4 evaluate people make results/minigpt4-7b results/blip2 --output people
    """
    from .human_judging import make_sheet

    sheet = make_sheet(runs, output, seed)
    typer.echo(f"{len(sheet.asked)} answers to judge in {output}")


def judge(sheet: SheetFolder, host: Host = "127.0.0.1", port: Port = None) -> None:
    """
    Serve the page to judge on.

    The page runs until Ctrl-C; every decision is saved as it is made.

    Examples:
        minigpt4 evaluate people judge people
    """
    from .human_judging import Sheet
    from .human_page import serve_sheet

    with serve_sheet(Sheet(sheet), host, port) as server:
        typer.echo(f"judge at {server.url}")
        server.wait()


def export_(
    sheet: SheetFolder,
    output: Annotated[Path, typer.Option(metavar="FILE", help="CSV file for the table.")],
    person: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the person whose decisions the table holds.")
    ] = None,
) -> None:
    """
    Write the sheet as a table, to fill in without the page.

    Examples:
        minigpt4 evaluate people export people --output sheet.csv
    """
    from .human_judging import Sheet, export_csv

    typer.echo(f"{export_csv(Sheet(sheet), output, person)} answers in {output}; fill in yes or no under success")


def import_(
    sheet: SheetFolder,
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="CSV file, filled in.")],
    person: Annotated[str, typer.Option(metavar="NAME", help="Name of the person whose decisions the table holds.")],
) -> None:
    """
    Import decisions from a table.

    Examples:
        minigpt4 evaluate people import people sheet.csv --person anna
    """
    from .human_judging import Sheet, import_csv

    typer.echo(f"{import_csv(Sheet(sheet), table, person)} decisions of {person}")


def count(
    sheet: SheetFolder,
    write: Annotated[
        bool,
        typer.Option("--write", help="Also write the verdicts into the results of the runs, replacing a judge's."),
    ] = False,
) -> None:
    """
    Print success counts by model and task (the paper's Table 1).

    Examples:
        minigpt4 evaluate people count people --write
    """
    from rich.console import Console
    from rich.table import Table

    from .human_judging import Sheet, count, write_verdicts
    from .tasks.advanced import PROMPTS

    opened = Sheet(sheet)
    counts = count(opened)
    table = Table(title="answers that satisfy the request, judged by people")
    for title in ("model", *PROMPTS, "undecided"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for name, tasks in counts["models"].items():
        cells = [f"{tasks[task]['success']}/{tasks[task]['judged']}" if task in tasks else "" for task in PROMPTS]
        table.add_row(name, *cells, str(sum(task["undecided"] for task in tasks.values())))
    Console().print(table)
    agreement = counts["agreement"]
    shared = "" if agreement is None else f"; of answers with several judges, all agree about {100 * agreement:.0f} %"
    people = ", ".join(f"{name} ({number})" for name, number in counts["people"].items())
    typer.echo(f"judges: {people or 'nobody yet'}{shared}")
    for folder in write_verdicts(opened) if write else ():
        typer.echo(f"written into {folder}")


COMMANDS: dict[str, Callable[..., None]] = {
    "make": make,
    "judge": judge,
    "export": export_,
    "import": import_,
    "count": count,
}
