"""Generations of several threads, decoded in one batch that rows join and leave at any token."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeGuard

import torch
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    PreTrainedConfig,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateOutput

from transformers_minigpt4.modeling.stop_sequences_minigpt4 import StopSequenceCriteria
from transformers_minigpt4.utils.models import GenerativeModel

from .prefix_cache import PLAIN_INPUTS


# Tokens that rows of equal settings get in turn, while rows of other settings wait.
_TURN = 16
# Arguments of `generate` that may differ between the rows of a batch.
_OF_THE_ROW = {"streamer", "stopping_criteria", "return_dict_in_generate", "max_new_tokens", "min_new_tokens"}


class BatchedModel:
    """
    A model whose `generate` many threads may call, each for one row; what they generate is decoded in one batch.

    It takes the place of the model in [`~inference.chat.Chat`]. Each prompt is read alone, as without this class.
    After its first token the row joins those that are being decoded, and leaves when its own answer ends. Greedy ids
    equal those that the model generates alone, as far as the rounding of a batch allows; in fp32 they are the same.

    Rows of other settings (temperature and so on) are decoded in turns of 16 tokens. Some models are decoded one row
    after another, each from beginning to end: encoder-decoder models, those with sliding windows or linear attention,
    and those whose processor gives them more than ids, mask and pixels (image sizes, grids).

    Args:
        model (`PreTrainedModel`), processor (`ProcessorMixin`): as for `Chat`.
        batch_size (`int`, *optional*, defaults to 8): rows that are decoded at once; others wait.
    """

    def __init__(self, model: GenerativeModel, processor: ProcessorMixin, batch_size: int = 8) -> None:
        self.model, self.batch_size = model, batch_size
        self.generation_config = model.generation_config
        # Not every call shows what a model needs: a question without images looks the same for all.
        inputs = set(processor.model_input_names) - {"token_type_ids"}
        self._together = inputs <= PLAIN_INPUTS and not model.config.is_encoder_decoder
        self._waiting: deque[_Row] = deque()
        self._changed = threading.Lock()
        self._running = False

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def generate(self, **kwargs: Any) -> torch.Tensor | GenerateOutput:
        """The model's own, for one row; waits for the answer. A streamer is called in the thread of the caller."""
        row = _Row(kwargs, self.model.generation_config)
        with self._changed:
            self._waiting.append(row)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="batched-generation", daemon=True).start()
        return row.wait()

    def _run(self) -> None:
        """Reads and decodes until nothing is left to do."""
        rows: list[_Row] = []
        while True:
            with self._changed:
                new = [self._waiting.popleft() for _ in range(min(self.batch_size - len(rows), len(self._waiting)))]
                if not rows and not new:
                    self._running = False
                    return
            for row in new:
                self._attempt(self._read, [row])
            rows = [row for row in [*rows, *new] if not row.ended]
            if rows:
                turn = [row for row in rows if row.settings == rows[0].settings]
                rest = [row for row in rows if row not in turn]
                self._attempt(partial(self._decode, limit=_TURN if rest else None), turn)
                rows = [*rest, *(row for row in turn if not row.ended)]

    @staticmethod
    def _attempt(work: "Callable[[list[_Row]], None]", rows: "list[_Row]") -> None:
        try:
            work(rows)
        except BaseException as error:
            for row in rows:
                row.finish(error=error)

    def _read(self, rows: "list[_Row]") -> None:
        """Reads the prompt of a new row, and generates the first token; or all, if it cannot join others."""
        (row,) = rows
        if row.abandoned:
            row.finish()
        elif self._together and row.is_plain:
            first = {"max_new_tokens": 1, "min_new_tokens": row.min_new_tokens and 1, "return_dict_in_generate": True}
            output = self.model.generate(**{**row.kwargs, **first})
            cache = getattr(output, "past_key_values", None)
            ids = output[0][0]  # of the only row
            if _is_plain_cache(cache) and cache.get_seq_length() == len(ids) - 1:
                row.start(ids, cache, self._ends(row))
            else:
                self._together = False
        if not row.ended and not row.count:
            row.finish(self.model.generate(**row.kwargs, streamer=_Forward(row)))

    def _ends(self, row: "_Row") -> StoppingCriteriaList:
        """What ends an answer besides its length: the criteria of the call, and those of the generation config."""
        config = self.model.generation_config
        criteria: list[StoppingCriteria] = list(row.kwargs.get("stopping_criteria") or ())
        if config.eos_token_id is not None:
            criteria.append(EosTokenCriteria(config.eos_token_id))
        if sequences := getattr(config, "stop_sequences", None):
            criteria.append(StopSequenceCriteria(sequences, self.device))
        return StoppingCriteriaList(criteria)

    def _decode(self, rows: "list[_Row]", limit: int | None) -> None:
        """Decodes rows of equal settings together, until one of them ends, or one that waits can join."""
        longest = max(len(row.ids) for row in rows)
        # Padded with an id that the row has anyway: a repetition penalty looks at the padding too.
        ids = torch.stack([torch.cat([row.ids[:1].expand(longest - len(row.ids)), row.ids]) for row in rows])
        positions = torch.arange(longest, device=ids.device)
        mask = torch.stack([positions >= longest - len(row.ids) for row in rows]).to(ids.dtype)

        def is_due(done: int) -> bool:
            return done == limit or (bool(self._waiting) and len(rows) < self.batch_size)

        step = _Step(rows, is_due)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=_join([row.layers for row in rows], longest - 1),
            **rows[0].settings,
            max_new_tokens=max(row.max_new_tokens - row.count for row in rows),
            stopping_criteria=StoppingCriteriaList([step]),
            return_dict_in_generate=True,
        )
        if isinstance(output, torch.Tensor) or not _is_plain_cache(output.past_key_values):
            raise TypeError(f"{type(self.model).__name__} lost the keys and values that it was given")
        _split(output.past_key_values, [row.layers for row in rows], [longest - len(row.ids) for row in rows])
        for row, sequence in zip(rows, output.sequences):
            row.extend(sequence[longest:])


class _Row:
    """A call of `generate`, and how far it has come."""

    def __init__(self, kwargs: dict[str, Any], config: GenerationConfig) -> None:
        self._streamer: BaseStreamer | None = kwargs.pop("streamer", None)
        self.kwargs = kwargs
        tensors = {name for name, value in kwargs.items() if isinstance(value, torch.Tensor | DynamicCache)}
        self.max_new_tokens = int(kwargs["max_new_tokens"])
        self.min_new_tokens = int(kwargs.get("min_new_tokens", config.min_new_tokens) or 0)
        self.is_plain = (
            tensors <= {*PLAIN_INPUTS, "past_key_values"}
            and _is_plain_cache(kwargs.get("past_key_values", DynamicCache()))
            and len(kwargs["input_ids"]) == kwargs.get("num_beams", 1) == kwargs.get("num_return_sequences", 1) == 1
        )
        self._own = {name: value for name, value in kwargs.items() if name not in tensors | _OF_THE_ROW}
        self.ids = torch.empty(0)  # prompt and answer
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values of all ids but the last
        self.count = 0  # tokens of the answer
        self.ended = self.abandoned = False
        self._ends = StoppingCriteriaList()
        self._output: Any = None
        self._error: BaseException | None = None
        self._news: SimpleQueue[torch.Tensor | None] = SimpleQueue()  # for the thread that waits

    @property
    def settings(self) -> dict[str, Any]:
        """What all rows of a batch must agree on."""
        return {**self._own, "min_new_tokens": max(0, self.min_new_tokens - self.count)}

    def start(self, ids: torch.Tensor, cache: DynamicCache, ends: StoppingCriteriaList) -> None:
        """Notes that the prompt has been read, and the first token."""
        self.layers, self._ends = [(keys, values) for keys, values, _ in cache], ends
        self.show(ids[:-1])
        self.show(ids[-1:])
        self.ids = ids[:-1]
        self.extend(ids[-1:])

    def extend(self, tokens: torch.Tensor) -> None:
        """Adds tokens to the answer; the last of them may end it."""
        self.ids = torch.cat([self.ids, tokens])
        self.count += len(tokens)
        if self.is_complete(self.ids, self.count):
            cache = DynamicCache(self.layers)
            self.finish(GenerateDecoderOnlyOutput(sequences=self.ids[None], past_key_values=cache))  # type: ignore[arg-type]

    def is_complete(self, ids: torch.Tensor, count: int) -> bool:
        """Whether an answer of `count` tokens, the end of `ids`, is complete."""
        return self.abandoned or count >= self.max_new_tokens or bool(self._ends(ids[None], None)[0])

    def show(self, ids: torch.Tensor) -> None:
        """Passes ids to the thread that waits."""
        self._news.put(ids.cpu())

    def finish(self, output: Any = None, error: BaseException | None = None) -> None:
        """Wakes the thread that waits."""
        self.ended, self._output, self._error = True, output, error
        self._news.put(None)

    def wait(self) -> Any:
        try:
            while (ids := self._news.get()) is not None:
                if self._streamer is not None:
                    self._streamer.put(ids)
        except BaseException:
            self.abandoned = True
            raise
        if self._error is not None:
            raise self._error
        if self._streamer is not None:
            self._streamer.end()
        return self._output


class _Forward(BaseStreamer):
    """Passes what `generate` streams to the thread that waits."""

    def __init__(self, row: _Row) -> None:
        self.row = row

    def put(self, value: torch.Tensor) -> None:
        self.row.show(value)

    def end(self) -> None:
        pass  # the row does, with its output


class _Step(StoppingCriteria):
    """
    Shows each token of a batch, and stops all rows as soon as one is complete or the batch is due to change.

    Args:
        rows (`Sequence[_Row]`): in the order of the batch.
        is_due (`Callable[[int], bool]`): whether to stop after a number of steps.
    """

    def __init__(self, rows: Sequence[_Row], is_due: Callable[[int], bool]) -> None:
        self.rows, self.is_due = rows, is_due
        self.steps = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.Tensor:
        self.steps += 1
        stop = self.is_due(self.steps)
        for row, ids in zip(self.rows, input_ids):
            row.show(ids[-1:])
            stop |= row.is_complete(ids, row.count + self.steps)
        return torch.full((len(input_ids),), stop, device=input_ids.device)


def _is_plain_cache(cache: object) -> TypeGuard[DynamicCache]:
    """Whether all layers keep keys and values of every position, so that rows can be joined and cut."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _join(rows: Sequence[list[tuple[torch.Tensor, torch.Tensor]]], length: int) -> DynamicCache:
    """A cache of `length` positions with all rows, padded on the left. The rows' lists are emptied to free memory."""
    joined = []
    for _ in range(len(rows[0])):
        layer = [row.pop(0) for row in rows]
        padded = [[pad(tensor, (0, 0, length - tensor.shape[2], 0)) for tensor in pair] for pair in layer]
        joined.append(tuple(torch.cat(tensors) for tensors in zip(*padded)))
    return DynamicCache(joined)


def _split(
    cache: DynamicCache, rows: Sequence[list[tuple[torch.Tensor, torch.Tensor]]], missing: Sequence[int]
) -> None:
    """Fills the rows' lists from a cache, without the padding; the cache is emptied layer by layer."""
    for layer, (keys, values, _) in zip(cache.layers, cache):
        for number, (row, count) in enumerate(zip(rows, missing)):
            one = slice(number, number + 1)
            row.append((keys[one, :, count:].clone(), values[one, :, count:].clone()))
        layer.reset()
