"""The `web` subcommand of `minigpt4`."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from transformers_minigpt4.utils.command_line import (
    BatchSize,
    Device,
    DType,
    Port,
    Quantization,
    TrustRemoteCode,
    complain,
    interruptible,
    usage_errors,
)


def web(
    context: typer.Context,
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Folders or Hub ids of image-text-to-text models. By default the latest model of `minigpt4 demo`.",
        ),
    ] = None,
    blind: Annotated[
        bool,
        typer.Option("--blind", help="Compare two of the checkpoints at a time, and show their names after a vote."),
    ] = False,
    listen: Annotated[
        bool,
        typer.Option("--listen", help="Let other machines use the page; needs --auth. By default only this one can."),
    ] = False,
    auth: Annotated[
        str | None,
        typer.Option(
            metavar="LOGIN",
            envvar="MINIGPT4_WEB_AUTH",
            help="USER:PASSWORD that the page asks for. Other users of this machine see options, but not variables.",
        ),
    ] = None,
    port: Port = None,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for votes and flags, with their conversations and images.")
    ] = Path("feedback"),
    greedy: Annotated[
        bool,
        typer.Option("--greedy", help="Always take the likeliest token. By default sample as the authors' chat does."),
    ] = False,
    batch_size: BatchSize = None,
    cache_memory: Annotated[
        float,
        typer.Option(min=0, metavar="GIB", help="Memory for what conversations have read; the oldest read it again."),
    ] = 4,
    max_upload: Annotated[int, typer.Option(min=1, metavar="MIB", help="Largest image file.")] = 32,
    dtype: DType = "auto",
    device: Device = None,
    quantization: Quantization = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Talk about images in the browser.

    Several checkpoints answer next to each other, and people can vote for the better answers. The page runs until
    Ctrl-C, and only this machine can open it unless --listen is given.

    Examples:
        minigpt4 web
        minigpt4 web my-checkpoint llava-hf/llava-1.5-7b-hf --blind
    """
    with interruptible("stopped before the page was ready"):
        from transformers_minigpt4.inference.demo_checkpoint import demo_checkpoint

        from .web_server import BATCH_SIZE, WebSettings, load_served, serve_chats

        batch_size = batch_size or BATCH_SIZE
        settings = WebSettings(output, blind, greedy, batch_size, cache_memory, max_upload, listen, port, auth)
        found = checkpoints or [demo_checkpoint()]
        with usage_errors(context):
            settings.check(found)
        served = load_served(found, batch_size, dtype, device, trust_remote_code, quantization)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the uploads are deleted
        with serve_chats(served, settings) as server:
            if listen:
                complain(
                    "other machines can open the page; password, images and texts are not encrypted on the way. Put "
                    "it behind a proxy with HTTPS, or use it in a network that you trust"
                )
            typer.echo(f"chat at {server.url}")
            server.wait()
