"""Starts vLLM's own OpenAI server, with this package's options in its words."""

import importlib.util
import os
import sys
from typing import NamedTuple, NoReturn


# vLLM checks names of hosts, not addresses, so by default it fetches from none. No such name can exist (RFC 6761).
_NO_HOST = "none.invalid"


class VllmOptions(NamedTuple):
    """The options of `minigpt4 serve`, see there."""

    checkpoint: str
    names: tuple[str, ...]
    host: str
    port: int
    dtype: str
    device: str | None
    quantization: str | None
    allow_private_urls: bool
    trust_remote_code: bool


def vllm_arguments(options: VllmOptions) -> list[str]:
    """
    The arguments of vLLM's server.

    Raises:
        ValueError: for options that vLLM does not have.
    """
    if options.device is not None:
        raise ValueError("vLLM chooses the device itself; leave out --device, and set CUDA_VISIBLE_DEVICES instead")
    if options.quantization == "bnb-8bit":
        raise ValueError("vLLM quantizes to 4 bits only while it loads; use --quantization bnb-4bit")
    words = ["--model", options.checkpoint, "--served-model-name", *options.names]
    words += ["--host", options.host, "--port", str(options.port), "--dtype", options.dtype]
    if options.quantization is not None:
        words += ["--quantization", "bitsandbytes"]
    if options.trust_remote_code:
        words.append("--trust-remote-code")
    if not options.allow_private_urls:
        words += ["--allowed-media-domains", _NO_HOST]
    return words


def start_vllm(options: VllmOptions, arguments: list[str]) -> NoReturn:
    """
    Becomes vLLM's server; does not return.

    Args:
        options (`VllmOptions`): the options of `minigpt4 serve`.
        arguments (`list[str]`): vLLM's own options, which come last and so take precedence.

    Raises:
        ValueError: where vLLM is not installed, and for options that it does not have.
    """
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *vllm_arguments(options), *arguments]
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed in this environment; it needs one of its own, see docs/guides/serve.md, or leave "
            "out --engine"
        )
    if not options.allow_private_urls:
        os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, words)
