"""The `serve` subcommand of `minigpt4`."""

import os
import socket
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from transformers_minigpt4.utils.command_line import (
    Device,
    DType,
    EngineOption,
    Host,
    Quantization,
    TrustRemoteCode,
    complain,
    interruptible,
)


if TYPE_CHECKING:
    from fastapi import FastAPI

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Folder or Hub id of an image-text-to-text model. By default the latest model of `minigpt4 demo`.",
        ),
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="OPTION...", help="Options of vLLM, after `--`, for --engine vllm.")
    ] = None,
    engine: EngineOption = "transformers",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, metavar="PORT", help="Port to listen on.")] = 8000,
    dtype: DType = "auto",
    device: Device = None,
    quantization: Quantization = None,
    allow_private_urls: Annotated[
        bool,
        typer.Option("--allow-private-urls", help="Fetch images from this machine and its network too, if asked to."),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Serve a model with OpenAI's API.

    Clients send chats with images as data: or http(s) URLs to http://127.0.0.1:8000/v1, and any API key. It runs until
    Ctrl-C. With --engine vllm, vLLM's own server is started, and gets what follows `--`.

    Examples:
        minigpt4 serve
        minigpt4 serve my-checkpoint --port 8001
        minigpt4 serve my-checkpoint --engine vllm -- --tensor-parallel-size 2
    """
    from transformers_minigpt4.inference.demo_checkpoint import demo_checkpoint, knows_drawn_shapes_only

    if (checkpoint or "").startswith("-"):
        raise ValueError(f"name the checkpoint before `--`; {checkpoint} came in its place")
    checkpoint = checkpoint or demo_checkpoint()
    if knows_drawn_shapes_only(checkpoint):
        complain("this is the demo's model, which knows drawn shapes only; name another one for photographs")
    if host not in _LOOPBACK:
        complain(f"listening at {host}: whoever reaches this machine can use the model, without a password")
    names = _served_names(checkpoint)
    if engine == "vllm":
        from .serve_vllm import VllmOptions, start_vllm

        start_vllm(
            VllmOptions(
                checkpoint, names, host, port, dtype, device, quantization, allow_private_urls, trust_remote_code
            ),
            arguments or [],
        )
    if arguments:
        raise ValueError(
            f"there is no use for {arguments[0]!r}: a server has one checkpoint, and only --engine vllm takes options "
            "after `--`; leave it out"
        )
    with interruptible("stopped serving"):
        serve_app = _import_app()
        from transformers_minigpt4.inference.loading import load_model_and_processor

        with _bound_socket(host, port) as bound:
            model, processor = load_model_and_processor(checkpoint, dtype, device, trust_remote_code, quantization)
            hosts = _LOOPBACK if host in _LOOPBACK else None
            app = serve_app.chat_app(names, model, processor, allow_private_urls, hosts)
            address = f"[{host}]" if ":" in host else host
            complain(f"serving {names[0]} at http://{address}:{port}/v1; Ctrl-C stops")
            _run(app, bound)


def _served_names(checkpoint: str) -> tuple[str, ...]:
    """What clients may call the model: a folder's own name, which is listed, and what was typed; or a Hub id."""
    if not os.path.isdir(checkpoint):
        return (checkpoint,)
    return tuple(dict.fromkeys((os.path.basename(os.path.realpath(checkpoint)) or checkpoint, checkpoint)))


def _import_app() -> ModuleType:
    try:
        from . import serve_app
    except (ImportError, NameError) as error:  # transformers' modules use names that they could not import
        raise ValueError(
            "serving needs packages that are not installed: pip install 'transformers_minigpt4[serve]'"
        ) from error
    return serve_app


def _bound_socket(host: str, port: int) -> socket.socket:
    """A socket that refuses connections until the server listens, so that a port in use is found before loading."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name != "nt":  # there it would share the port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ValueError(
            f"cannot listen at port {port} of {host} ({error.strerror}); choose another --port or --host"
        ) from error
    return bound


def _run(app: "FastAPI", bound: socket.socket) -> None:
    """Answers requests until Ctrl-C; each is a line on stdout."""
    import logging

    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    server.run(sockets=[bound])
