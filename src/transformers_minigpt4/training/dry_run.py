"""Prepares a run as far as its first row, and shows what of this row is learned."""

import sys
import tempfile
from dataclasses import dataclass

from rich.console import Console
from trl import ModelConfig

from transformers_minigpt4.utils.families import family_of

from .arguments import StageArguments, StageConfig
from .loading import load_model, load_rows
from .row_tokens import marked_tokens, tokens_of
from .setup import make_trainer


@dataclass(frozen=True)
class TokenizedRow:
    """
    The first row of a run as the model gets it.

    Args:
        tokens (`list[tuple[str, bool]]`): Each token, and whether it is learned.
        trained (`int`), parameters (`int`): Number of values that are trained, and of all.
    """

    tokens: list[tuple[str, bool]]
    trained: int
    parameters: int


def first_row(stage: StageArguments, config: StageConfig, model_args: ModelConfig) -> TokenizedRow:
    """
    Loads rows and model, prepares the trainer with all its checks, and collates the first row. Writes nothing.

    Raises:
        ValueError: as a run would.
    """
    with tempfile.TemporaryDirectory() as scratch:
        config.output_dir = scratch  # a recipe may save its base there
        rows = load_rows(stage, config)
        model, processor = load_model(stage, config, model_args)
        trainer = make_trainer(stage, config, model_args, model, processor, rows)
        batch = trainer.data_collator([next(iter(rows.dataset))])
        sizes = [(value.numel(), value.requires_grad) for value in trainer.model.parameters()]
    tokens = tokens_of(batch, processor, family_of(model.config).encoder_decoder)
    return TokenizedRow(tokens, sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes))


def print_row(row: TokenizedRow) -> None:
    """Prints tokens and figures; learned tokens are green, or in brackets where stdout is not a terminal."""
    colored = sys.stdout.isatty()
    text = marked_tokens(row.tokens, colored)
    learned = sum(learned for _, learned in row.tokens)
    if colored:
        Console().print(text, soft_wrap=True)
    else:
        print(text.plain.strip())
    how = "in green" if colored else "in brackets"
    print(f"\n{len(row.tokens)} tokens, {learned} of them learned ({how})")
    print(f"{row.trained:,} of {row.parameters:,} parameters are trained")
