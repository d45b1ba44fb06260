"""Prepares a run as far as its first row, and shows what of this row is learned."""

import sys
import tempfile
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.text import Text
from transformers import ProcessorMixin
from trl import ModelConfig

from transformers_minigpt4.utils.families import family_of

from .arguments import StageArguments, StageConfig
from .collator import IGNORED, Batch
from .loading import load_model, load_rows
from .loss import POSITIONS
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
    tokens = _tokens(batch, processor, family_of(model.config).encoder_decoder)
    return TokenizedRow(tokens, sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes))


def _tokens(batch: Batch, processor: ProcessorMixin, encoder_decoder: bool) -> list[tuple[str, bool]]:
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    if encoder_decoder:  # the encoder reads the prompt, the decoder writes the answer
        answer = [label for label in labels if label != IGNORED]
        ids, learned = [*ids, *answer], [False] * len(ids) + [True] * len(answer)
    elif POSITIONS in batch:  # labels are kept only where they are, each predicted by the position before it
        learned = [False] * len(ids)
        for position in batch[POSITIONS][:-1].tolist():
            learned[position + 1] = True
    else:
        learned = [label != IGNORED for label in labels]
    return list(zip(processor.tokenizer.convert_ids_to_tokens(ids), learned))


def print_row(row: TokenizedRow) -> None:
    """Prints tokens and figures; learned tokens are green, or in brackets where stdout is not a terminal."""
    colored = sys.stdout.isatty()
    text = Text()
    for learned, group in groupby(row.tokens, key=lambda token: token[1]):
        words = " ".join(_repeated([name for name, _ in group]))
        text.append(words if colored or not learned else f"[{words}]", "green" if learned else "dim")
        text.append(" ")
    learned = sum(learned for _, learned in row.tokens)
    if colored:
        Console().print(text, soft_wrap=True)
    else:
        print(text.plain.strip())
    how = "in green" if colored else "in brackets"
    print(f"\n{len(row.tokens)} tokens, {learned} of them learned ({how})")
    print(f"{row.trained:,} of {row.parameters:,} parameters are trained")


def _repeated(names: list[str]) -> list[str]:
    """Names, with one that is repeated written once."""
    runs = [(name, len(list(group))) for name, group in groupby(names)]
    return [name if count == 1 else f"{name} x {count}" for name, count in runs]
