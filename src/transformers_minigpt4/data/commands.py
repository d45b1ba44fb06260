"""The `data` subcommands of `minigpt4` that make training data of released files."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from transformers_minigpt4.utils.command_line import Overwrite, complain


ScienceQAFormat: TypeAlias = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="Order of question and answer, such as CQM-A: Question, Context, Multiple options; Lecture, Explanation, "
        "Answer.",
    ),
]
ScienceQASplit: TypeAlias = Annotated[str, typer.Option("--split", metavar="NAME", help="Split of pid_splits.json.")]


def scienceqa(
    data: Annotated[
        Path,
        typer.Argument(help="Folder of ScienceQA's release: problems.json, pid_splits.json and the images."),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="JSON file for the rows, in LLaVA's format.")],
    split: ScienceQASplit = "train",
    row_format: ScienceQAFormat = "QCM-LEA",
    overwrite: Overwrite = False,
) -> None:
    """
    Convert ScienceQA's release to training rows of LLaVA.

    Texts are exactly those of the authors' converter. Rows whose image is missing are left out and counted.

    Examples:
        minigpt4 data scienceqa /data/scienceqa --output scienceqa_train.json
        minigpt4 data scienceqa /data/scienceqa --format CQM-A --split val --output scienceqa_val.json
    """
    from .scienceqa import write_training_rows

    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; name another --output, or give --overwrite")
    done = write_training_rows(data, output, split, row_format)
    if done.missing:
        complain(f"{len(done.missing)} rows are left out, because their image is missing, such as {done.missing[0]}")
    typer.echo(f"wrote {done.rows} rows to {output}, {done.with_image} of them with an image", err=True)
    typer.echo(f"llava:{output}" + (f"::images={done.images}" if done.images is not None else ""))
