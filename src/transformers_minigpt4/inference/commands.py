"""The `describe` subcommand of `minigpt4`."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transformers_minigpt4.utils.command_line import (
    BatchSize,
    Device,
    DType,
    TrustRemoteCode,
    complain,
    interruptible,
)


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .describe import CaptionFile


def describe(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="Files, folders, URLs, or - for a list on standard input."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Folder or Hub id of an image-text-to-text model. By default the latest model of `minigpt4 demo`.",
        ),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What to ask about each image.")] = "Describe this image in detail.",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON Lines file to append to; rerun the command to resume."),
    ] = None,
    batch_size: BatchSize = 8,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum length of an answer, in tokens. By default the checkpoint's setting, else 300."
        ),
    ] = None,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample/--greedy",
            help="Sample answers as the authors' chat does, or always take the likeliest token.",
        ),
    ] = False,
    dtype: DType = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Describe images.

    The description of a single image is streamed to the screen. Several images give one JSON line each, on standard
    output or appended to --output: {"image", "caption", "prompt", "model"}. An image that fails is reported and
    skipped, and the exit status is then 1; rerunning the command with the same --output tries it again.

    Examples:
        minigpt4 describe photo.jpg
        minigpt4 describe photos --model my-checkpoint --output captions.jsonl
    """
    from .demo_checkpoint import demo_checkpoint
    from .describe import CaptionFile
    from .describe import describe as describe_images
    from .loading import load_model_and_processor
    from .sources import expand_sources
    from .streaming import CaptionStreamer

    with ExitStack() as stack:
        sources = expand_sources(images, sys.stdin)
        if not sources:
            raise ValueError("the list of images is empty; name at least one file, folder or URL")
        checkpoint = model or demo_checkpoint()
        captions = stack.enter_context(CaptionFile(output, prompt, checkpoint)) if output else None
        remaining = [source for source in sources if captions is None or source not in captions.done]
        if captions is not None and not remaining:
            typer.echo(f"all {len(sources)} images are in {output} already", err=True)
            return
        loaded, processor = load_model_and_processor(checkpoint, dtype, device, trust_remote_code)
        streamed = len(sources) == 1 and captions is None
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens} if max_new_tokens is not None else {}
        if streamed:
            batch_size = 1
            settings["streamer"] = CaptionStreamer(processor, lambda text: typer.echo(text, nl=False))
        records = describe_images(
            remaining, loaded, processor, prompt=prompt, batch_size=batch_size, do_sample=sample, **settings
        )
        failed = (
            _finish_one(records) if streamed else _write_all(records, len(remaining), captions, prompt, checkpoint)
        )
        if failed:
            raise typer.Exit(1)


def _finish_one(records: "Iterator[dict[str, str]]") -> int:
    """Streams one answer to stdout; returns how many images failed."""
    record = next(records)
    if "error" in record:
        complain(record["error"])
        return 1
    typer.echo()
    return 0


def _write_all(
    records: "Iterable[dict[str, str]]", count: int, captions: "CaptionFile | None", prompt: str, checkpoint: str
) -> int:
    """Writes one JSON line per image to `captions` or stdout; returns how many images failed."""
    from tqdm.auto import tqdm

    from transformers_minigpt4.utils.files import to_json

    done = failed = 0
    where = f" in {captions.path}" if captions is not None else ""

    def stopped() -> str:
        bar.close()
        resume = f", now{where}; rerun the same command to resume" if captions is not None else ""
        return f"stopped after {done} of {count} images{resume}"

    # disable=None: no bar where stderr is a file.
    with tqdm(total=count, unit="image", file=sys.stderr, disable=None) as bar, interruptible(stopped):
        for record in records:
            if "error" in record:
                failed += 1
                bar.write(f"minigpt4: {record['error']}", file=sys.stderr)
                bar.set_postfix(failed=failed)
            else:
                done += 1
                if captions is not None:
                    captions.append(record)
                else:
                    bar.write(to_json({**record, "prompt": prompt, "model": checkpoint}), file=sys.stdout)
                    sys.stdout.flush()
            bar.update()
    if failed or captions is not None:
        typer.echo(f"{done} described{where}, {failed} failed", err=True)
    return failed
