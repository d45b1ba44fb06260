"""The `evaluate demo` subcommand of `minigpt4`: the tasks of the evaluation on the demo's own images."""

from pathlib import Path
from typing import Annotated

import typer


EVALUATION_OUTPUT = Path("minigpt4-evaluation") / "demo"


def evaluate_demo(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, data and results.")] = EVALUATION_OUTPUT,
    seed: Annotated[int, typer.Option(help="Draws the toy world, the training and the bootstrap samples.")] = 0,
) -> None:
    """Run the tasks on the demo's drawn images with their own models, data and judge, without a GPU."""
    from .evaluation import evaluate_demo

    evaluate_demo(output, seed)
