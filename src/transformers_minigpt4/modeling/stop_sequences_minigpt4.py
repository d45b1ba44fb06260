"""Where answers end: at sequences of ids, which a streamer does not get."""

from typing import Any, Protocol

import torch
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class StopSequenceCriteria(StoppingCriteria):
    """
    Ends a row whose last generated ids are one of `stop_sequences`, each row of a batch for itself.

    The stop string `###` has two tokenizations (one token after a space, two after a word), and the second cannot be
    an `eos_token_id`. transformers' `stop_strings` would need the tokenizer at every call of `generate`.
    """

    def __init__(self, stop_sequences: list[list[int]], device: torch.device | None = None):
        self.stop_sequences = [torch.tensor(sequence, device=device) for sequence in stop_sequences]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.Tensor:
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for sequence in self.stop_sequences:
            if input_ids.shape[1] >= len(sequence):
                done |= (input_ids[:, -len(sequence) :] == sequence.to(input_ids.device)).all(dim=1)
        return done


class Streamer(Protocol):
    """What `generate` calls of a streamer; not every one is a [`~generation.BaseStreamer`]."""

    def put(self, value: torch.Tensor) -> Any: ...

    def end(self) -> Any: ...


class WithoutStopSequences(BaseStreamer):
    """
    Hands the ids of one answer on to a streamer, without the stop sequence that ends it.

    Ids that may begin a stop sequence wait for the next ones. Streamers decode with the tokenizer alone, so text such
    as `###` would be shown otherwise. Several answers at once, which few streamers take, are handed on as they are.

    Args:
        streamer (`Streamer`): Receives the prompt, and then one id at a time.
        stop_sequences (`list[list[int]]`): What ends an answer.
    """

    def __init__(self, streamer: Streamer, stop_sequences: list[list[int]]):
        self.streamer, self.stop_sequences = streamer, stop_sequences
        self.waiting: list[int] = []
        self.is_one_answer: bool | None = None  # unknown before the prompt
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        if not self.is_one_answer:
            self.is_one_answer = self.is_one_answer is None and value.shape[:1] == (1,)
            self.streamer.put(value)
            return
        for id_ in value.flatten().tolist():
            if self.ended:  # assisted generation accepts several ids at once
                return
            self.waiting.append(id_)
            complete = [len(stop) for stop in self.stop_sequences if stop and self.waiting[-len(stop) :] == stop]
            if complete:
                del self.waiting[-max(complete) :]
                self.ended = True
            else:
                self._hand_on(len(self.waiting) - self._beginning())

    def end(self) -> None:
        self._hand_on(len(self.waiting))
        self.streamer.end()

    def _beginning(self) -> int:
        """How many of the last ids may be the beginning of a stop sequence."""
        longest = max(map(len, self.stop_sequences), default=0) - 1
        return next(
            (
                length
                for length in range(min(longest, len(self.waiting)), 0, -1)
                if any(stop[:length] == self.waiting[-length:] for stop in self.stop_sequences)
            ),
            0,
        )

    def _hand_on(self, count: int) -> None:
        for id_ in self.waiting[:count]:
            self.streamer.put(torch.tensor([id_]))
        del self.waiting[:count]
