"""The `evaluate people` subcommands of `minigpt4`."""

from pathlib import Path
from typing import Annotated

import typer


_SHEET_HELP = "Folder of the sheet, as made by `minigpt4 evaluate people make`."


def make(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of results with the task advanced, one a model.")
    ],
    output: Annotated[Path, typer.Option(help="New folder for the sheet.")],
    seed: Annotated[int, typer.Option(help="Draws the order.")] = 0,
) -> None:
    """Put the answers of several models into one shuffled sheet that does not show who gave them."""
    from .human_judging import make_sheet

    sheet = make_sheet(runs, output, seed)
    typer.echo(f"{len(sheet.asked)} answers to judge in {output}")


def judge(
    sheet: Annotated[Path, typer.Argument(help=_SHEET_HELP)],
    host: Annotated[str, typer.Option(help="Address to listen at; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="By default the first free one from 7860 on.")] = None,
) -> None:
    """Open the page to judge on. Every decision is on the disk at once; Ctrl-C ends."""
    from .human_judging import Sheet
    from .human_page import serve_sheet

    with serve_sheet(Sheet(sheet), host, port) as server:
        typer.echo(f"judge at {server.url}")
        server.wait()


def export_(
    sheet: Annotated[Path, typer.Argument(help=_SHEET_HELP)],
    table: Annotated[Path, typer.Argument(help="CSV file to write.")],
    person: Annotated[str | None, typer.Option(help="Fill in what this person has decided so far.")] = None,
) -> None:
    """Write the sheet as a table, to be filled in without the page."""
    from .human_judging import Sheet, export_csv

    typer.echo(f"{export_csv(Sheet(sheet), table, person)} answers in {table}; fill in yes or no under success")


def import_(
    sheet: Annotated[Path, typer.Argument(help=_SHEET_HELP)],
    table: Annotated[Path, typer.Argument(help="CSV file, filled in.")],
    person: Annotated[str, typer.Option(help="Whose decisions these are.")],
) -> None:
    """Take over decisions from a table."""
    from .human_judging import Sheet, import_csv

    typer.echo(f"{import_csv(Sheet(sheet), table, person)} decisions of {person}")


def count(
    sheet: Annotated[Path, typer.Argument(help=_SHEET_HELP)],
    write: Annotated[
        bool,
        typer.Option("--write", help="Also put the verdicts into the results of the runs, in place of a judge's."),
    ] = False,
) -> None:
    """Print success counts by model and task, in the form of the paper's Table 1."""
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


COMMANDS = {"make": make, "judge": judge, "export": export_, "import": import_, "count": count}
