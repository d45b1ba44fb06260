"""The `data` subcommands of `minigpt4` that make training data of released files."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from transformers_minigpt4.utils.command_line import Overwrite, Seed, complain, interruptible, this_command


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
    Convert ScienceQA to training rows.

    The rows are in LLaVA's format, and their texts exactly those of the authors' converter. Rows whose image is
    missing are left out and counted.

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


def filter_cc3m(
    captions: Annotated[
        Path,
        typer.Argument(help="CC3M's TSV, with the caption first, or JSON Lines with caption or text."),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="File for the lines that are kept, as they are.")],
    phrases: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON Lines with the noun phrases of each caption. With --extractor, those that it lacks are added; "
            "by default OUTPUT.phrases.jsonl.",
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What finds noun phrases: spacy:MODEL, or python:MODULE:FUNCTION of a list of captions.",
        ),
    ] = None,
    least: Annotated[int, typer.Option(min=1, help="Phrases in fewer captions are dropped.")] = 3,
    most: Annotated[int, typer.Option(min=1, help="Captions drawn of a phrase that more of them have.")] = 100,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """
    Choose captions by their noun phrases.

    As LLaVA's authors did with CC3M: rare phrases keep all captions, frequent ones a random 100. If interrupted, rerun
    the same command: phrases that were found are kept.

    Examples:
        minigpt4 data filter-cc3m Train_GCC-training.tsv --output pool.tsv --extractor spacy:en_core_web_sm
        minigpt4 data filter-cc3m captions.jsonl --phrases phrases.jsonl --output pool.jsonl --seed 1
    """
    if phrases is None and extractor is None:
        raise ValueError("give --extractor, such as spacy:en_core_web_sm, or --phrases found before")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; name another --output, or give --overwrite")
    found = phrases if phrases is not None else output.with_name(f"{output.name}.phrases.jsonl")
    with interruptible(f"stopped; the phrases so far are in {found}, `{this_command()}` resumes"):
        from tqdm import tqdm

        from .caption_filter import filter_captions

        with tqdm(unit="caption", desc="phrases", disable=None) as bar:
            done = filter_captions(
                captions,
                output,
                found,
                extractor=extractor,
                least=least,
                most=most,
                seed=seed,
                progress=lambda number: bar.update(number - bar.n),
            )
    typer.echo(f"captions  {done.captions:,}, of which {done.kept:,} are kept")
    typer.echo(f"phrases   {done.phrases:,}, of which {done.frequent_phrases:,} are in at least {least} captions")
    typer.echo(f"kept lines in {output}", err=True)
