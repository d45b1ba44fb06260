"""The `data` subcommands of `minigpt4`: looks at sources of training rows before a run does."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def check(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="KIND:PATH, such as wds:/data/{00000..00099}.tar; see docs/reference/formats.md."
        ),
    ],
    form: Annotated[
        Literal["stage1", "stage2", "stage2_llama2", "messages"], typer.Option(help="The form the rows must fit.")
    ] = "stage2",
    limit: Annotated[int, typer.Option(min=0, help="Rows to read of each source; 0 for all.")] = 1000,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Read them in a drawn order.")] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG file for a contact sheet; of several sources, numbered ones.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Pictures on the contact sheet.")] = 24,
    throughput: Annotated[
        float | None, typer.Option(min=0.1, metavar="SECONDS", help="Measure the loader alone for so long.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Data workers of that measurement.")] = 0,
) -> None:
    """
    Show what a source holds, what is wrong with it, and how long its captions are.

    Pictures are decoded as in training. The exit status is 1 when a source has no usable row.
    """
    from transformers_minigpt4.data.sources import parse_source

    from .data_check import check_source, loader_throughput, save_contact_sheet

    empty = []
    for number, source in enumerate([parse_source(text) for text in sources]):
        found = check_source(source, form, limit=limit or None, shuffle=shuffle, max_images=images)
        typer.echo(found.report())
        if not found.words:
            empty.append(str(source))
        elif sheet is not None and found.images:
            path = sheet if len(sources) == 1 else sheet.with_stem(f"{sheet.stem}-{number}")
            save_contact_sheet(path, found.images)
            typer.echo(f"  contact sheet in {path}")
        if throughput is not None and found.words:
            rate = loader_throughput(source, form, workers=workers, seconds=throughput)
            typer.echo(f"  loader   {rate:.0f} rows/s, decoded and resized to 224 x 224, {workers} data workers")
    if empty:
        raise ValueError(f"no usable row in {', '.join(empty)}")
