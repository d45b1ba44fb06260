"""The `demo` and `evaluate demo` subcommands of `minigpt4`: training and evaluation on the toy world."""

from pathlib import Path
from typing import Annotated

import typer

from transformers_minigpt4.utils.command_line import Seed


_Folder = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for checkpoints, images and results.")]


def demo(
    output: _Folder = Path("minigpt4-demo"),
    seed: Seed = 0,
    llava: Annotated[
        bool, typer.Option("--llava", help="Train a tiny LLaVA instead, on instruction data made for it.")
    ] = False,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Then also train the variants of the paper, and compare.")
    ] = False,
) -> None:
    """
    Train a tiny MiniGPT-4 or LLaVA on generated images.

    Needs neither a GPU nor downloads. Afterwards, `minigpt4 describe` uses the result where no --model is named.

    Examples:
        minigpt4 demo
        minigpt4 demo --output my-demo --seed 1
        minigpt4 demo --llava
    """
    if llava:
        from .llava import ABLATIONS, run_llava

        run_llava(output / "llava", seed=seed, ablations=ABLATIONS if ablations else ())
        return
    from transformers_minigpt4.inference.demo_checkpoint import keep_checkpoint

    from .run import run_demo

    run_demo(output, seed=seed)
    keep_checkpoint(output / "checkpoint")
    if ablations:
        from .ablations import run_ablations

        run_ablations(output, seed=seed)


def evaluate_demo(output: _Folder = Path("minigpt4-evaluation") / "demo", seed: Seed = 0) -> None:
    """
    Train the demo's models and evaluate them on generated images.

    Data and a rule-based judge are made for the demo. Needs neither a GPU nor downloads.

    Examples:
        minigpt4 evaluate --demo
    """
    from .evaluation import evaluate_demo

    evaluate_demo(output, seed)
