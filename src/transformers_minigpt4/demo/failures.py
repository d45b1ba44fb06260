"""
Compares checkpoints of the toy world by the share of descriptions that fail.

    python -m transformers_minigpt4.demo.failures minigpt4-demo/stage1 output/tiny_stage2

All describe the same images, of combinations that no training stage has shown; `demo.scoring` defines a failure.
"""

import sys
from pathlib import Path

from transformers_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from transformers_minigpt4.utils.text import first_line

from .run import describe, held_out, quiet_and_single_threaded
from .scoring import FAILURES, summarize


def measure(checkpoint: str | Path, images: int = 173, seed: int = 0) -> dict[str, float]:
    """
    Shares of right attributes and of failures, see `scoring.summarize`.

    Args:
        checkpoint: Folder of a model of the toy world.
        images: How many, at most 173.
        seed: Draws them.

    Raises:
        OSError: when there is no checkpoint in the folder.
    """
    scenes, shown = held_out(seed, images)
    with quiet_and_single_threaded():
        model = MiniGPT4ForConditionalGeneration.from_pretrained(checkpoint)
        processor = MiniGPT4Processor.from_pretrained(checkpoint)
        texts, ended = describe(model.eval(), processor, shown)
    return summarize(texts, scenes, ended)


def main(checkpoints: list[str]) -> None:
    """The command."""
    if not checkpoints:
        sys.exit("usage: python -m transformers_minigpt4.demo.failures CHECKPOINT...")
    for checkpoint in checkpoints:
        try:
            shares = measure(checkpoint)
        except (OSError, ValueError) as error:
            sys.exit(f"failures: {first_line(error)}")
        kinds = ", ".join(f"{kind} {shares[kind]:.1%}" for kind in FAILURES)
        print(f"{checkpoint}: {shares['failed']:.1%} of the descriptions failed ({kinds})")


if __name__ == "__main__":
    main(sys.argv[1:])
