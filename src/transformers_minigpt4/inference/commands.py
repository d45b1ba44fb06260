"""The `describe` subcommand of `minigpt4`."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from transformers_minigpt4.utils.command_line import (
    BatchSize,
    Device,
    DType,
    EngineOption,
    Quantization,
    TrustRemoteCode,
    complain,
    echo,
    interruptible,
    restart,
    this_command,
)


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tqdm import tqdm

    from .caption_file import CaptionFile


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
    engine: EngineOption = "transformers",
    batch_size: BatchSize = None,
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
    quantization: Quantization = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    Describe images.

    The description of a single image is streamed to the screen. Several images give one JSON line each, on standard
    output or appended to --output: {"image", "caption", "prompt", "model"}. An image that fails is reported and
    skipped, and the exit status is then 1. Rerunning the command with the same --output tries it again; if it still
    cannot be read, a note says so and the exit status is 0.

    Examples:
        minigpt4 describe photo.jpg
        minigpt4 describe photos --model my-checkpoint --output captions.jsonl
    """
    how = restart() if output is None else f"`{this_command()}` resumes"
    if "-" in images:
        how += " with the same list on standard input"
    with ExitStack() as stack:
        stack.enter_context(interruptible(f"stopped before the first image; {how}"))
        from .caption_file import CaptionFile
        from .demo_checkpoint import demo_checkpoint, knows_drawn_shapes_only
        from .describe import describe as describe_images
        from .engines import TransformersEngine
        from .loading import load_engine
        from .sources import expand_sources
        from .streaming import CaptionStreamer

        sources = expand_sources(images, sys.stdin)
        if not sources:
            raise ValueError("the list of images is empty; name at least one file, folder or URL")
        checkpoint = model or demo_checkpoint()
        captions = stack.enter_context(CaptionFile(output, prompt, checkpoint)) if output else None
        run = _Run(sources, captions, how)
        if not run.remaining:
            return
        if knows_drawn_shapes_only(checkpoint):
            complain("this is the demo's model, which knows drawn shapes only; name another one with --model")
        alone = len(sources) == 1 and captions is None
        loaded = load_engine(
            engine,
            checkpoint,
            batch_size=1 if alone else batch_size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            quantization=quantization,
        )
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens} if max_new_tokens is not None else {}
        streamed = False
        if alone and isinstance(loaded, TransformersEngine):
            streamed = True
            settings["streamer"] = CaptionStreamer(loaded.processor, run.show)
        records = describe_images(run.remaining, loaded, prompt=prompt, do_sample=sample, **settings)
        stack.enter_context(interruptible(run.stopped))
        failed = _finish_one(records, streamed) if alone else run.write_all(records, prompt, checkpoint)
        if failed:
            raise typer.Exit(1)


def _finish_one(records: "Iterator[dict[str, str]]", streamed: bool) -> int:
    """Writes one answer to stdout, which may be there already; returns how many images failed."""
    record = next(records)
    if "error" in record:
        complain(record["error"])
        return 1
    echo("" if streamed else record["caption"])
    return 0


class _Run:
    """
    The images that one command describes, and how far it is.

    Args:
        sources: All images, those that are in `captions` already included.
        captions: Where the answers go; by default to stdout.
        how: How to resume or to start again.
    """

    def __init__(self, sources: list[str], captions: "CaptionFile | None", how: str) -> None:
        self.captions, self.how = captions, how
        self.where = f" in {captions.path}" if captions is not None else ""
        self.done = self.failed = 0
        self.mid_line = False
        self.bar: tqdm[NoReturn] | None = None
        self.remaining = sources
        if captions is None:
            return
        self.remaining, still = captions.remaining(sources)
        if still:
            images = "1 image" if still == 1 else f"{still} images"
            typer.echo(f"{images} failed before and still cannot be read, see {captions.failures}", err=True)
        if not self.remaining and len(sources) > still:
            typer.echo(f"all {'others' if still else f'{len(sources)} images'} are{self.where} already", err=True)

    def show(self, text: str) -> None:
        """Writes a piece of an answer to stdout."""
        self.mid_line = True
        echo(text, nl=False)

    def stopped(self) -> str:
        """What to say at Ctrl-C."""
        if self.bar is not None:
            self.bar.close()
        if self.mid_line:
            typer.echo()
        kept = f", now{self.where}" if self.where else ""
        return f"stopped after {self.done} of {len(self.remaining)} images{kept}; {self.how}"

    def write_all(self, records: "Iterable[dict[str, str]]", prompt: str, checkpoint: str) -> int:
        """Writes one JSON line per image to the file or stdout; returns how many images failed."""
        from tqdm.auto import tqdm

        from transformers_minigpt4.utils.files import to_json
        from transformers_minigpt4.utils.text import without_control_characters

        # disable=None: no bar where stderr is a file.
        with tqdm(total=len(self.remaining), unit="image", file=sys.stderr, disable=None) as self.bar:
            for record in records:
                if "error" in record:
                    self.failed += 1
                    self.bar.write(without_control_characters(f"minigpt4: {record['error']}"), file=sys.stderr)
                    self.bar.set_postfix(failed=self.failed)
                else:
                    self.done += 1
                if self.captions is not None:
                    self.captions.write(record)
                elif "error" not in record:
                    self.bar.write(to_json({**record, "prompt": prompt, "model": checkpoint}), file=sys.stdout)
                    sys.stdout.flush()
                self.bar.update()
        if self.failed or self.captions is not None:
            typer.echo(f"{self.done} described{self.where}, {self.failed} failed", err=True)
        return self.failed
