"""What `transformers serve` generates with, in place of its own: requests in one batch, stop strings cut, hang-ups."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import BatchFeature, GenerationConfig, ProcessorMixin
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseGenerateManager, GenerationState, Modality

from transformers_minigpt4.inference.batching import BatchedModel
from transformers_minigpt4.inference.generation import context_length
from transformers_minigpt4.inference.streaming import CaptionStreamer
from transformers_minigpt4.utils.models import GenerativeModel
from transformers_minigpt4.utils.text import first_line

from .serve_errors import ApiError


# What a request can change in a generation config (`ChatCompletionHandler`).
_SETTINGS = ("do_sample", "temperature", "top_p", "repetition_penalty")


class OneModel(ModelManager):
    """
    The one model of this server, which is loaded already: no request loads another, or unloads this one.

    Args:
        name (`str`): what requests call it.
        model (`PreTrainedModel`), processor (`ProcessorMixin`): of any image-text-to-text family.
    """

    def __init__(self, name: str, model: GenerativeModel, processor: ProcessorMixin) -> None:
        super().__init__()
        self.force_model, self.model, self.processor = name, model, processor

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Model and processor."""
        return self.model, self.processor

    def process_model_name(self, model_id: str) -> str:  # type: ignore[override]  # static there
        """The name as it is; transformers adds a revision."""
        return model_id

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:  # type: ignore[override]  # static there
        """Images and text; transformers knows the modalities of its own classes only."""
        return Modality.VLM

    def shutdown(self) -> None:
        """Keeps the model, as long as the process lives."""


class BatchedGeneration(GenerationState):
    """Generates for all requests with one [`Generator`]."""

    def __init__(self, model: GenerativeModel, processor: ProcessorMixin) -> None:
        super().__init__()
        self.generator = Generator(model, processor)

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """The generator."""
        return self.generator


class Generator(BaseGenerateManager):
    """
    Generates answers, each in a thread, decoded in one batch.

    Answers are decoded by the processor, so that they end before the checkpoint's stop strings, and before those of
    the request. A client that hangs up ends its answer at the next token.

    Args:
        model (`PreTrainedModel`), processor (`ProcessorMixin`): of any image-text-to-text family.
    """

    def __init__(self, model: GenerativeModel, processor: ProcessorMixin) -> None:
        self.model, self.processor = BatchedModel(model, processor), processor

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: object = None,
    ) -> Any:
        """Starts an answer; returns the queue of its pieces, ended by `None` or an error, and its [`Answer`]."""
        loop, queue = asyncio.get_running_loop(), _Pieces()
        answer = self._start(inputs, gen_config, lambda piece: loop.call_soon_threadsafe(queue.put_nowait, piece))
        return queue, answer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> Any:
        """Text, number of ids of the prompt, and ids of a complete answer."""
        queue, answer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        pieces: list[str] = []
        try:
            while (piece := await queue.get()) is not None:
                pieces.append(piece)
        except asyncio.CancelledError:
            answer.cancel()
            raise
        return "".join(pieces), inputs["input_ids"].shape[-1], answer.tokens

    def stop(self) -> None:
        """Nothing; threads end with the process."""

    def _start(
        self, inputs: BatchFeature, gen_config: GenerationConfig, write: Callable[[str | Exception | None], object]
    ) -> "Answer":
        self._limit(inputs["input_ids"].shape[-1], gen_config)
        stops = [gen_config.stop_strings] if isinstance(gen_config.stop_strings, str) else gen_config.stop_strings
        answer = Answer(self.processor, write, stops or ())
        changed = _changed(gen_config, self.model.generation_config)
        ready = inputs.to(self.model.device, dtype=self.model.dtype)

        def run() -> None:
            try:
                with contextlib.suppress(_Ended):
                    length = gen_config.max_new_tokens
                    self.model.generate(**ready, **changed, max_new_tokens=length, streamer=answer)
                write(None)
            except Exception as error:
                write(_as_api_error(error))

        threading.Thread(target=run, name="answer", daemon=True).start()
        return answer

    def _limit(self, length: int, gen_config: GenerationConfig) -> None:
        """Keeps prompt and answer within the context."""
        context = context_length(self.model)
        if context is None:
            return
        if length >= context:
            raise ApiError(
                f"the prompt has {length} tokens, images included, but the model's context is {context}; shorten the "
                "conversation, or send fewer images",
                param="messages",
                code="context_length_exceeded",
            )
        gen_config.max_new_tokens = min(gen_config.max_new_tokens or context, context - length)


class Answer(CaptionStreamer):
    """
    An answer that grows, and can be cancelled.

    Args:
        processor (`ProcessorMixin`): decodes the answer.
        write (`Callable[[str], object]`): receives the pieces.
        stops (`Sequence[str]`, *optional*): ends the answer before any of these.
    """

    def __init__(self, processor: ProcessorMixin, write: Callable[[str], object], stops: Sequence[str] = ()) -> None:
        super().__init__(processor, self._write_before_stops)
        self._out, self._stops = write, tuple(stops)
        self._waiting = ""  # may be the beginning of a stop string
        self._ended = threading.Event()

    @property
    def total_tokens(self) -> int:
        """Tokens that have been generated."""
        return len(self.tokens)

    def cancel(self) -> None:
        """Ends the generation at its next token."""
        self._ended.set()

    def put(self, value: torch.Tensor) -> None:
        if self._ended.is_set():
            raise _Ended
        super().put(value)
        if self._ended.is_set():
            raise _Ended

    def end(self) -> None:
        super().end()
        if not self._ended.is_set():
            self._out(self._waiting)

    def _write_before_stops(self, text: str) -> None:
        self._waiting += text
        found = [place for stop in self._stops if (place := self._waiting.find(stop)) >= 0]
        if found:
            self._ended.set()
            self._out(self._waiting[: min(found)])
            return
        beginning = max((_overlap(self._waiting, stop) for stop in self._stops), default=0)
        ready = len(self._waiting) - beginning
        if ready:
            self._out(self._waiting[:ready])
            self._waiting = self._waiting[ready:]


class _Ended(Exception):
    """Raised in a streamer, ends the generation."""


class _Pieces(asyncio.Queue[Any]):
    """A queue that raises the errors in it where they are taken out: `transformers serve` would stream broken JSON."""

    def get_nowait(self) -> Any:
        item = super().get_nowait()
        if isinstance(item, Exception):
            raise item
        return item


def _changed(config: GenerationConfig, own: GenerationConfig) -> dict[str, object]:
    """The settings that a request changes."""
    changed = {name: getattr(config, name) for name in _SETTINGS if getattr(config, name) != getattr(own, name)}
    if changed.get("temperature"):  # the checkpoint's own answers may be greedy
        changed["do_sample"] = True
    if changed.get("do_sample") is False:
        changed = {name: value for name, value in changed.items() if name not in ("temperature", "top_p")}
    return changed


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def _as_api_error(error: Exception) -> ApiError:
    if type(error).__name__ == "OutOfMemoryError":
        return ApiError(
            "the device is out of memory; send fewer or shorter requests at once", 503, code="out_of_memory"
        )
    return ApiError(f"the model failed: {first_line(error)}", 500, code="generation_failed")
