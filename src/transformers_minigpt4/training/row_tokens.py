"""Rows as a model reads them: every token, and whether it is learned."""

from itertools import groupby, islice

from rich.text import Text
from transformers import AutoConfig, AutoProcessor, ProcessorMixin

from transformers_minigpt4.data.prompt_formats import PromptFormat
from transformers_minigpt4.data.schema import Row, message_text
from transformers_minigpt4.utils.checkpoint_files import loading_from
from transformers_minigpt4.utils.families import family_of

from .collator import IGNORED, Batch, collator_of
from .loss import POSITIONS
from .prompt_check import fit_processor


class RowReader:
    """
    Tokenizes rows as training with a checkpoint does; its weights are not loaded.

    Args:
        checkpoint (`str`): Folder or Hub id.
        max_completion_length (`int`, *optional*): Tokens of an answer; longer ones are cut.
        prompt_format (`str`, *optional*, defaults to `"messages"`): Of the rows.

    Raises:
        OSError, ValueError: for a checkpoint that is not there, or cannot be trained.
    """

    def __init__(
        self, checkpoint: str, max_completion_length: int | None, prompt_format: PromptFormat = "messages"
    ) -> None:
        with loading_from(checkpoint, weights=False):
            self.config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
            self.processor: ProcessorMixin = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
        self.processor = fit_processor(prompt_format, self.config, self.processor)
        self.limit = max_completion_length
        self.collator = collator_of(self.config, self.processor)

    def tokens(self, row: Row) -> tuple[list[tuple[str, bool]], bool]:
        """
        The tokens of a row, each with whether it is learned, and whether an answer was cut.

        Raises:
            ValueError: for a row that the checkpoint's collator refuses.
        """
        batch = self.collator([row])
        found = tokens_of(batch, self.processor, family_of(self.config).encoder_decoder)
        kept: list[tuple[str, bool]] = []
        for learned, run in groupby(found, key=lambda token: token[1]):
            kept += islice(run, self.limit if learned else None)
        return kept, len(kept) < len(found)


def tokens_of(batch: Batch, processor: ProcessorMixin, encoder_decoder: bool) -> list[tuple[str, bool]]:
    """The tokens of a batch of one row, each with whether it is learned."""
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


def marked_tokens(tokens: list[tuple[str, bool]], colored: bool = False) -> Text:
    """Tokens in one line; learned ones are in brackets, or green."""
    runs = groupby(tokens, key=lambda token: token[1])
    segments = [(" ".join(_repeated([name for name, _ in run])), learned) for learned, run in runs]
    return _marked(segments, colored)


def marked_text(row: Row) -> Text:
    """The text of a row before any model has read it, with what is learned marked as in [`marked_tokens`]."""
    if "completion" in row:
        return _marked([(row["prompt"], False), (row["completion"], True)])
    segments = []
    for turn in row["messages"]:
        images = sum(part["type"] == "image" for part in turn["content"])
        segments += [
            (" ".join([f"{turn['role']}:", *["<image>"] * images]), False),
            (message_text(turn), turn["role"] == "assistant"),
        ]
    return _marked(segments)


def _marked(segments: list[tuple[str, bool]], colored: bool = False) -> Text:
    text = Text()
    for words, learned in segments:
        text.append(words if colored or not learned else f"[{words}]", "green" if learned else "dim")
        text.append(" ")
    return text


def _repeated(names: list[str]) -> list[str]:
    """Names, with one that is repeated written once."""
    runs = [(name, len(list(group))) for name, group in groupby(names)]
    return [name if count == 1 else f"{name} x {count}" for name, count in runs]
