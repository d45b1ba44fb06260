"""Answers requests with vLLM, without a server: it takes the next one as soon as one that it works on is finished."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, GenerationConfig, ProcessorMixin
from transformers.utils import logging

from transformers_minigpt4.utils.checkpoint_files import loading_from
from transformers_minigpt4.utils.models import check_is_folder
from transformers_minigpt4.utils.text import first_line

from .engines import Request, TokenRequest
from .generation import DEFAULT_MAX_NEW_TOKENS, conversation, decode_answers


# Arguments of `generate` with vLLM's names for them.
_SAMPLING = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
}
# `generate` takes the seed of torch instead.
_DRAWING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed"}
# Those that ask for what vLLM does anyway, with these values.
_IMPLIED = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "do_sample": None}
_TOP_K = 50  # of `generate`, where nothing else is set
NOT_INSTALLED = (
    "the engine vllm needs vLLM, which is not installed in this environment; it pins its own torch, so install it and "
    "this package in an environment of their own, as docs/guides/caption.md says, or use the engine transformers"
)
ONE_OF_ANOTHER_ENGINE = "use the engine transformers"


class VllmEngine:
    """
    Answers with vLLM, which starts the next request as soon as one of those that it works on ends.

    Features of an image are computed once for all requests about it that are near each other: vLLM knows images by
    their content.

    Args:
        checkpoint (`str`): a folder or a Hub id of a complete checkpoint.
        batch_size (`int`, *optional*): requests that are worked on at once; by default as many as vLLM chooses.
        dtype (`str`, *optional*, defaults to `"auto"`), trust_remote_code (`bool`, *optional*, defaults to `False`):
            As of [`~inference.engines.load_engine`].
        device (`str`, *optional*): the kind that vLLM was built for, such as `"cuda"`, or `"auto"` for all GPUs.
        images_per_prompt (`int`, *optional*, defaults to 1): the most images of a request.
        options: passed on to vLLM's `LLM`.

    Raises:
        ValueError: if vLLM is not installed, cannot load the checkpoint, or runs on another kind of device.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        batch_size: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        images_per_prompt: int = 1,
        **options: Any,
    ) -> None:
        # Not its log, which goes to stdout, where captions go: read when it is imported, in its other processes too.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        if logging.get_verbosity() >= logging.ERROR:
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
        try:
            from vllm import LLM, SamplingParams
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ValueError(NOT_INSTALLED if error.name == "vllm" else f"vLLM cannot be imported: {error}") from error
        options = {**_devices(device, current_platform.device_type), **options}
        if batch_size is not None:
            options["max_num_seqs"] = batch_size
        self.processor = _load_processor(checkpoint, trust_remote_code)
        self.generation_config = GenerationConfig()
        with suppress(OSError):  # a checkpoint need not have one
            self.generation_config = GenerationConfig.from_pretrained(checkpoint)
        try:
            self._llm = LLM(
                checkpoint,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                limit_mm_per_prompt={"image": max(1, images_per_prompt)},
                **options,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(
                f"vLLM cannot load {checkpoint!r}: {first_line(error)}; VLLM_LOGGING_LEVEL=INFO in the environment "
                "shows its messages"
            ) from error
        self._parameters = SamplingParams
        self.batch_size: int = self._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self.device: str = current_platform.device_type
        self.dtype: str = str(self._llm.model_config.dtype)

    def answers(self, requests: Iterable[Request], **generate_kwargs: object) -> Iterator[str]:
        """See [`~inference.engines.Engine`]."""
        for ids in self.answer_ids(requests, **generate_kwargs):
            # Its own text differs where the tokens of a character's bytes do not make one.
            yield decode_answers(self.processor, torch.tensor([ids]))[0]

    def answer_ids(self, requests: Iterable[Request | TokenRequest], **generate_kwargs: object) -> Iterator[list[int]]:
        """See [`~inference.engines.TokenEngine`]."""
        parameters = self._parameters(**sampling_settings(self.generation_config, generate_kwargs))
        engine = self._llm.llm_engine
        waiting = iter(requests)
        running: dict[str, int] = {}  # the place of each request that vLLM has, by vLLM's number for it
        finished: dict[int, list[int]] = {}
        taken = given = 0
        more = True
        try:
            while more or running:
                # As many again as it works on, so that one is ready when another ends.
                while more and len(running) < 2 * self.batch_size:
                    request = next(waiting, None)
                    if request is None:
                        more = False
                        break
                    running[self._enqueue(request, parameters)] = taken
                    taken += 1
                for output in engine.step() if running else ():
                    if output.finished:
                        finished[running.pop(output.request_id)] = list(output.outputs[0].token_ids)
                while given in finished:
                    yield finished.pop(given)
                    given += 1
        finally:
            if running:
                engine.abort_request(list(running))

    def _enqueue(self, request: Request | TokenRequest, parameters: Any) -> str:
        prompt: dict[str, object]
        options = {}
        if isinstance(request, TokenRequest):
            prompt = {"prompt_token_ids": request.ids}
        else:
            text = _rendered(request, self.processor)
            prompt = {"prompt": text}
            # As in `apply_chat_template` of transformers' processors.
            start = self.processor.tokenizer.bos_token
            options["tokenization_kwargs"] = {"add_special_tokens": start is None or not text.startswith(start)}
        if request.images:
            prompt["multi_modal_data"] = {"image": list(request.images)}
        (number,) = self._llm.enqueue([prompt], parameters, use_tqdm=False, **options)
        return number.partition("-")[0]  # vLLM makes numbers unique by a random suffix, which its outputs leave out


def _load_processor(checkpoint: str, trust_remote_code: bool) -> ProcessorMixin:
    """
    The processor of a complete checkpoint.

    Raises:
        ValueError: if there is no such checkpoint, or it has only trained modules or an adapter.
    """
    check_is_folder(checkpoint)
    partial = os.path.isfile(os.path.join(checkpoint, "adapter_config.json"))
    if not partial:
        try:
            with loading_from(checkpoint):
                config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
                processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        except OSError as error:
            raise ValueError(f"cannot load {checkpoint!r}: {first_line(error)}; give a folder or Hub id") from error
        partial = bool(getattr(config, "base_checkpoints", None))
    if partial:
        raise ValueError(
            f"{checkpoint!r} holds only what was trained, and vLLM needs a complete checkpoint; write one with "
            f"`minigpt4 merge`, or {ONE_OF_ANOTHER_ENGINE}"
        )
    return processor


def sampling_settings(config: GenerationConfig, generate_kwargs: Mapping[str, object]) -> dict[str, Any]:
    """
    Settings of `generate` as arguments of vLLM's `SamplingParams`.

    Args:
        config (`GenerationConfig`): the checkpoint's.
        generate_kwargs (`Mapping`): what a call sets, which takes precedence.

    Raises:
        ValueError: for a setting that vLLM does not have.
    """
    set_ = {name: value for name, value in {**vars(config), **generate_kwargs}.items() if value is not None}
    known = _SAMPLING | _DRAWING | _IMPLIED
    if unknown := [name for name in generate_kwargs if name not in known]:
        raise ValueError(f"the engine vllm does not know the setting {unknown[0]!r}; {ONE_OF_ANOTHER_ENGINE}")
    for name, value in _IMPLIED.items():
        if value is not None and set_.get(name, value) != value:
            whose = "" if name in generate_kwargs else " of the checkpoint's generation config"
            raise ValueError(f"the engine vllm does not support {name}={set_[name]}{whose}; {ONE_OF_ANOTHER_ENGINE}")
    settings = {theirs: set_[ours] for ours, theirs in _SAMPLING.items() if ours in set_}
    settings.setdefault("max_tokens", DEFAULT_MAX_NEW_TOKENS)
    if set_.get("do_sample"):
        settings |= {theirs: set_[ours] for ours, theirs in _DRAWING.items() if ours in set_}
        settings.setdefault("top_k", _TOP_K)
    else:
        settings["temperature"] = 0.0
    return settings


def _rendered(request: Request, processor: ProcessorMixin) -> str:
    """The text of a request, which vLLM extends by the positions of the images; bare without a chat template."""
    if not getattr(processor, "chat_template", None):
        if request.earlier:
            name = type(processor).__name__
            raise ValueError(
                f"{name} has no chat template and takes one turn only; use a checkpoint with a chat template"
            )
        return request.prompt
    turns = conversation(request.images, request.prompt, request.earlier)
    return str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _devices(device: str | None, kind: str) -> dict[str, Any]:
    """
    A device as arguments of vLLM.

    Raises:
        ValueError: for a device that vLLM was not built for, and for one of several.
    """
    if device == "auto":
        return {"tensor_parallel_size": max(1, torch.accelerator.device_count())} if kind != "cpu" else {}
    if device is not None and device != kind:
        if device.startswith(f"{kind}:"):
            raise ValueError(
                f"the engine vllm takes no {device!r}; choose it by CUDA_VISIBLE_DEVICES={device.partition(':')[2]} "
                f"in the environment, and leave the device out"
            )
        raise ValueError(
            f"this vLLM runs on {kind!r}, not on {device!r}; leave the device out, or {ONE_OF_ANOTHER_ENGINE}"
        )
    return {}
