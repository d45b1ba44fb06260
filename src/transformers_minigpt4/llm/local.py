"""A chat model on this machine: any causal language model of transformers with a chat template, in batches."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, cast

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from transformers_minigpt4.utils.checkpoint_files import loading_from
from transformers_minigpt4.utils.models import GenerativeModel, check_is_folder, usable_device
from transformers_minigpt4.utils.text import first_line

from .budget import Reservation
from .cache import AnswerCache
from .client import ChatModel, Key
from .types import BudgetExhausted, ChatAnswer, ChatError, ChatSettings, Message, Usage, checked_messages


class LocalChatModel(ChatModel):
    """
    See [`ChatModel`]. `concurrency` prompts are one batch; token counts are exact.

    Raises:
        ValueError: if the model cannot be loaded or has no chat template.
    """

    def __init__(self, settings: ChatSettings, cache: AnswerCache | None = None, spent: Usage | None = None) -> None:
        super().__init__(settings, cache, spent)
        self.tokenizer, self.model = _load(settings.model)
        self._identity = _fingerprint(settings.model, self.model)
        self._end_tokens = _end_tokens(self.tokenizer, self.model)
        self._context: int | None = getattr(self.model.config, "max_position_embeddings", None)

    def identity(self) -> str:
        return self._identity

    def complete_many(
        self, requests: Iterable[tuple[Key, list[Message]]]
    ) -> Iterator[tuple[Key, ChatAnswer | ChatError]]:
        source = iter(requests)
        while batch := list(islice(source, self.settings.concurrency)):
            asked: list[tuple[Key, list[Message]]] = []
            for key, messages in batch:
                messages = checked_messages(messages)
                try:
                    cached = self.from_cache(messages)
                except ChatError as error:  # one that was cut off
                    yield key, error
                    continue
                if cached is None:
                    asked.append((key, messages))
                else:
                    yield key, cached
            yield from self._answer(asked)

    def _answer(self, batch: list[tuple[Key, list[Message]]]) -> Iterator[tuple[Key, ChatAnswer | ChatError]]:
        """Answers a batch; in several parts if the budget does not cover the most that all of it can use."""
        waiting: list[_Prompt[Key]] = []
        for key, messages in batch:
            ids = self._token_ids(messages)
            if self._context is not None and len(ids) >= self._context:
                yield key, ChatError("refused", self._too_long(len(ids)))
            else:
                waiting.append(_Prompt(key, messages, ids))
        while waiting:
            part: list[tuple[_Prompt[Key], Reservation]] = []
            for prompt in waiting:
                try:
                    part.append((prompt, self.ledger.reserve(len(prompt.ids), wait=False)))
                except BudgetExhausted:
                    if not part:
                        raise
                    break  # what this part leaves unused may be enough for the rest
            waiting = waiting[len(part) :]
            yield from self._generate(part)

    def _token_ids(self, messages: list[Message]) -> list[int]:
        try:
            begun = messages[-1]["role"] == "assistant"  # an answer whose beginning is given, to be continued
            encoding = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=not begun, continue_final_message=begun, return_dict=True
            )
        except TemplateError as error:  # some have no system role, some require alternating roles
            raise ChatError(
                "refused",
                f"the chat template of {self.name} refuses the conversation ({error}); choose another model",
                fatal=True,
            ) from error
        ids: list[int] = cast(BatchEncoding, encoding)["input_ids"]
        return ids

    def _generate(
        self, part: "list[tuple[_Prompt[Key], Reservation]]"
    ) -> Iterator[tuple[Key, ChatAnswer | ChatError]]:
        inputs = self.tokenizer.pad(
            {"input_ids": [prompt.ids for prompt, _ in part]}, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        settings = self.settings
        longest = settings.max_tokens
        if self._context is not None:
            longest = min(longest, self._context - inputs["input_ids"].shape[1])
        sampling: dict[str, object] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": 1.0, "top_k": 0}
        try:
            with torch.inference_mode():
                sequences = self.model.generate(
                    **inputs,
                    max_new_tokens=longest,
                    pad_token_id=self.tokenizer.pad_token_id,
                    return_dict_in_generate=False,
                    **sampling,
                )
        except BaseException:
            for _, reservation in part:
                self.ledger.release(reservation)
            raise
        answers = cast(torch.Tensor, sequences)[:, inputs["input_ids"].shape[1] :].tolist()
        # All are counted before the first is yielded, because the consumer may stop there.
        results = [self._counted(prompt, reservation, ids) for (prompt, reservation), ids in zip(part, answers)]
        for (prompt, _), answer in zip(part, results):
            yield prompt.key, self._kept(prompt.messages, answer)

    def _counted(self, prompt: "_Prompt[Key]", reservation: Reservation, ids: list[int]) -> ChatAnswer:
        end = next((place for place, token in enumerate(ids) if token in self._end_tokens), None)
        count = len(ids) if end is None else end + 1
        cost = self.ledger.settle(reservation, len(prompt.ids), count)
        # Without the end token, which need not be a special token.
        (text,) = self.tokenizer.batch_decode([ids[:end]], skip_special_tokens=True)
        return ChatAnswer(text.strip(), "length" if end is None else "stop", len(prompt.ids), count, cost)

    def _kept(self, messages: list[Message], answer: ChatAnswer) -> ChatAnswer | ChatError:
        if not answer.text:
            return ChatError("empty", f"{self.name} gave an empty answer; try another model or prompt")
        try:
            return self.keep(messages, answer)
        except ChatError as error:
            return error

    def _too_long(self, length: int) -> str:
        return (
            f"the prompt has {length} tokens and {self.name} reads {self._context} with its answer; shorten the text, "
            "or use a model with a longer context"
        )


@dataclass(frozen=True)
class _Prompt(Generic[Key]):
    key: Key
    messages: list[Message]
    ids: list[int]


def _load(name: str) -> tuple[PreTrainedTokenizerBase, GenerativeModel]:
    check_is_folder(name, ", or set base_url for an endpoint")
    try:
        with loading_from(name):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype="auto", device_map=usable_device(None), trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load {name!r} as chat model: {first_line(error)}; give a folder or Hub id of a causal language "
            "model, or set base_url for an endpoint"
        ) from error
    if not tokenizer.chat_template:
        raise ValueError(f"{name!r} has no chat template, so it is not a chat model; choose an instruction-tuned one")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {name!r} has neither padding nor end token; set one in its config")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model


def _end_tokens(tokenizer: PreTrainedTokenizerBase, model: GenerativeModel) -> set[int]:
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _fingerprint(name: str, model: GenerativeModel) -> str:
    """The commit of a model from the Hub; for a folder, a digest of its files' names, sizes and times."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)
    files = sorted(path for path in Path(name).iterdir() if path.is_file()) if os.path.isdir(name) else []
    listed = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return "local:" + hashlib.sha256(repr(listed).encode()).hexdigest()
