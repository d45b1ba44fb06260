"""Writes one answer word by word while the model generates it."""

import re
from collections.abc import Callable

import torch
from transformers import ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from .generation import decode_answers


# Characters of scripts written without spaces, which a stream must not hold back until the next space.
_UNSPACED_SCRIPT = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")


class CaptionStreamer(BaseStreamer):
    """
    Writes one growing answer word by word; pass it to [`~inference.describe.describe`] as `streamer` with
    `batch_size=1`.

    transformers' `TextStreamer` decodes with the tokenizer only and so would show the stop string, which is ordinary
    text for a model that ends its answers with `###`. Here the last word is held back until it cannot be part of one.

    Args:
        processor (`ProcessorMixin`): decodes the answer.
        write (`Callable[[str], object]`): receives the pieces, which add up to the caption.
    """

    def __init__(self, processor: ProcessorMixin, write: Callable[[str], object]) -> None:
        self.processor, self.write = processor, write
        self.tokens: list[int] = []
        self.written = 0
        self.prompt_passed = False

    def put(self, value: torch.Tensor) -> None:
        # The first call brings the prompt, as in every streamer of transformers.
        if not self.prompt_passed:
            self.prompt_passed = True
            return
        self.tokens += value.reshape(-1).tolist()
        text = self._text()
        # Without the space before the last word: if that is a stop string, the answer ends before both.
        words = text if _UNSPACED_SCRIPT.match(text[-1:]) else text[: text.rfind(" ") + 1].rstrip()
        self._write_until(text, len(words))

    def end(self) -> None:
        text = self._text()
        self._write_until(text, len(text))

    def _text(self) -> str:
        return decode_answers(self.processor, torch.tensor([self.tokens]))[0] if self.tokens else ""

    def _write_until(self, text: str, stop: int) -> None:
        if stop > self.written:
            self.write(text[self.written : stop])
            self.written = stop
