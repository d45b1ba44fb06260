"""The local page on which people judge answers, and the `evaluate people` subcommands of `minigpt4`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer


if TYPE_CHECKING:
    from transformers_minigpt4.web.pages import PageServer

    from .human_judging import Item, Sheet


QUESTION = "Does the answer satisfy the request?"
_SHEET_HELP = "Folder of the sheet, as made by `minigpt4 evaluate people make`."


def judging_page(sheet: "Sheet") -> Any:
    """
    The page of a sheet: one answer at a time with its picture and the request, without the model's name.

    Args:
        sheet: What is judged.

    Returns:
        `gradio.Blocks`.

    Raises:
        ValueError: where Gradio is not installed.
    """
    from transformers_minigpt4.web.pages import escape, image_html, import_gradio, new_page, person_name

    gradio = import_gradio("evaluation")
    page = new_page("Judge answers")

    def show(person: str, item: "Item | None") -> list[Any]:
        decided = sheet.decisions().get(person, {})
        progress = f"{len(decided)} of {len(sheet.asked)} judged by {person}"
        off = gradio.update(interactive=False)
        if item is None:
            return ["", "", "<p>That was the last one. Thank you.</p>", progress, off, off]
        before = f" You said {'yes' if decided[item.id] else 'no'}." if item.id in decided else ""
        text = f'<h3>{escape(item.prompt)}</h3><div class="foreign-text" id="answer">{escape(item.answer or "")}</div>'
        on = gradio.update(interactive=True)
        return [item.id, image_html(item.image, "the picture"), text, progress + "." + before, on, on]

    def start(name: str) -> list[Any]:
        person = _or_error(person_name, name)
        return show(person, sheet.next_for(person))

    def decide(name: str, key: str, success: bool) -> list[Any]:
        person = _or_error(person_name, name)
        _or_error(sheet.decide, key, person, success)
        return show(person, sheet.next_for(person))

    def back(name: str, key: str) -> list[Any]:
        person = _or_error(person_name, name)
        order = list(sheet.decisions().get(person, {}))
        earlier = order[: order.index(key)] if key in order else order
        return show(person, sheet.item(earlier[-1]) if earlier else sheet.next_for(person))

    with page:
        gradio.Markdown(f"# Judge answers\n{QUESTION} Who gave it is not shown. Keys: y, n, and b for back.")
        with gradio.Row():
            name = gradio.Textbox(label="Your name", elem_id="name", max_length=64)
            begin = gradio.Button("Start", elem_id="start")
        progress = gradio.Markdown(elem_id="progress")
        with gradio.Row():
            image = gradio.HTML()
            text = gradio.HTML()
        with gradio.Row():
            yes = gradio.Button("Yes (y)", elem_id="yes", interactive=False)
            no = gradio.Button("No (n)", elem_id="no", interactive=False)
            return_ = gradio.Button("Back (b)", elem_id="back")
        current = gradio.Textbox(visible=False)
        shown = [current, image, text, progress, yes, no]
        begin.click(start, [name], shown, queue=False)
        name.submit(start, [name], shown, queue=False)
        yes.click(lambda who, key: decide(who, key, True), [name, current], shown, queue=False)
        no.click(lambda who, key: decide(who, key, False), [name, current], shown, queue=False)
        return_.click(back, [name, current], shown, queue=False)
    return page


def _or_error(function: Any, *arguments: Any) -> Any:
    """Calls a function whose complaint a page shows."""
    import gradio

    try:
        return function(*arguments)
    except (ValueError, OSError) as error:
        raise gradio.Error(str(error)) from error


def serve_sheet(sheet: "Sheet", host: str = "127.0.0.1", port: int | None = None) -> "PageServer":
    """
    Serve the page of a sheet, on this machine alone unless told otherwise.

    Raises:
        ValueError: where Gradio is not installed.
        OSError: where the port is taken.
    """
    from transformers_minigpt4.web.pages import serve

    from .human_judging import IMAGES

    keys = {"y": "yes", "n": "no", "b": "back"}
    return serve(judging_page(sheet), files=sheet.folder / IMAGES, keys=keys, host=host, port=port)


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
