"""The `data` subcommands of `minigpt4`: inspect sources of training rows before a run does."""

from pathlib import Path
from typing import Annotated

import typer

from transformers_minigpt4.utils.command_line import PromptFormat, complain


def check(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="KIND:PATH, such as wds:/data/{00000..00099}.tar, or a path alone, whose kind is guessed; see "
            "docs/reference/formats.md.",
        ),
    ],
    prompt_format: PromptFormat = "stage2",
    limit: Annotated[int, typer.Option(min=0, help="Rows to read of each source; 0 for all.")] = 1000,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Folder or Hub id of the model to train: rows are shown as its tokens. Its weights are not loaded.",
        ),
    ] = None,
    max_completion_length: Annotated[
        int, typer.Option(min=1, help="Tokens of an answer, as in the recipe; longer ones count as cut.")
    ] = 160,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show as the model reads them.")] = 3,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Read the rows in random order.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PNG file for a contact sheet; one per source, numbered, if several."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Number of images on the contact sheet.")] = 24,
    throughput: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="SECONDS", help="Measure the speed of the loader alone for this long."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes of that measurement.")] = 0,
) -> None:
    """
    Show a source's rows, their errors and their lengths.

    Images are decoded as in training. The first rows are shown as the model reads them, with what is learned in
    brackets. The exit status is 1 if a source has no usable row.

    Examples:
        minigpt4 data check cc_sbu_align:/data/cc_sbu_align --limit 0 --output sheet.png
        minigpt4 data check "wds:/data/cc_sbu/{00000..00009}.tar" --prompt-format stage1 --model my-model
        minigpt4 data check my-photos/metadata.csv
    """
    from transformers_minigpt4.data.sources import parse_source

    from .data_check import check_source, loader_throughput, report_line, save_contact_sheet
    from .row_tokens import RowReader

    parsed = [parse_source(text) for text in sources]
    for source in parsed:
        if source.guessed is not None:
            complain(f"{source.path} is read as {source}, because it is {source.guessed}")
    reader = RowReader(model, max_completion_length, prompt_format) if model is not None else None
    empty = []
    for number, source in enumerate(parsed):
        found = check_source(
            source,
            prompt_format,
            limit=limit or None,
            shuffle=shuffle,
            max_images=images,
            reader=reader,
            show=rows,
        )
        typer.echo(found.report())
        if not found.words:
            empty.append(str(source))
        elif output is not None and found.images:
            path = output if len(sources) == 1 else output.with_stem(f"{output.stem}-{number}")
            save_contact_sheet(path, found.images)
            typer.echo(f"  contact sheet in {path}")
        if throughput is not None and found.words:
            rate = loader_throughput(source, prompt_format, workers=workers, seconds=throughput)
            what = f"{rate:.0f} rows/s, decoded and resized to 224 x 224, {workers} worker processes"
            typer.echo(report_line("loader", what))
    if empty:
        raise ValueError(f"no usable row in {', '.join(empty)}")
