"""The `describe` subcommand of `minigpt4`."""

import sys
from contextlib import ExitStack
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

from .shard_commands import RayWorkers, ShardSize, finish, open_place


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tqdm import tqdm

    from .caption_file import CaptionFile
    from .images import BulkImage, Description
    from .sources import SourceShard


def describe(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="Files, folders, URLs, - for a list on standard input; or KIND:PATH as in docs/reference/formats.md.",
        ),
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
        str | None,
        typer.Option(
            metavar="FILE",
            help="JSON Lines file to append to, or KIND:FOLDER for one file per shard, with KIND jsonl, parquet or "
            "wds; rerun the command to resume.",
        ),
    ] = None,
    ray_workers: RayWorkers = None,
    shard_size: ShardSize = 1000,
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

    For very many images, --output KIND:FOLDER writes one file per shard, which appears when it is complete; several
    processes can fill the folder, and rerunning the command does the shards that are missing.

    Examples:
        minigpt4 describe photo.jpg
        minigpt4 describe photos --model my-checkpoint --output captions.jsonl
        minigpt4 describe wds:shards --model my-checkpoint --output parquet:captions --ray-workers auto
    """
    how = restart() if output is None else f"`{this_command()}` resumes"
    if "-" in images:
        how += " with the same list on standard input"
    place = open_place(output, ray_workers, images, device)
    with ExitStack() as stack:
        stack.enter_context(interruptible(f"stopped before the first image; {how}"))
        from transformers_minigpt4.inference.demo_checkpoint import demo_checkpoint, knows_drawn_shapes_only
        from transformers_minigpt4.inference.describe import check_prompt
        from transformers_minigpt4.inference.engines import TransformersEngine
        from transformers_minigpt4.inference.loading import load_engine
        from transformers_minigpt4.inference.streaming import CaptionStreamer

        from .caption_file import CaptionFile
        from .images import describe_images

        check_prompt(prompt)
        files, shards = _named_images(images)
        checkpoint = model or demo_checkpoint()
        settings: dict[str, Any] = {"do_sample": sample}
        if max_new_tokens is not None:
            settings["max_new_tokens"] = max_new_tokens
        if place is not None:
            from .shard_run import EngineSettings, ShardRun

            loading = EngineSettings(engine, checkpoint, batch_size, dtype, device, trust_remote_code, quantization)
            shard_run = ShardRun(
                place.folder, place.sink(prompt, checkpoint), files, shards, loading, prompt, shard_size, settings
            )
            if not finish(shard_run, place, how):
                raise typer.Exit(1)
            return
        captions = stack.enter_context(CaptionFile(output, prompt, checkpoint)) if output else None
        run = _Run(files, shards, captions, how)
        if not run.remaining and not shards:
            return
        if knows_drawn_shapes_only(checkpoint):
            complain("this is the demo's model, which knows drawn shapes only; name another one with --model")
        alone = len(files) == 1 and not shards and captions is None
        loaded = load_engine(
            engine,
            checkpoint,
            batch_size=1 if alone else batch_size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            quantization=quantization,
        )
        streamed = False
        if alone and isinstance(loaded, TransformersEngine):
            streamed = True
            settings["streamer"] = CaptionStreamer(loaded.processor, run.show)
        descriptions = describe_images(run.images(), loaded, prompt=prompt, **settings)
        stack.enter_context(interruptible(run.stopped))
        failed = _finish_one(descriptions, streamed) if alone else run.write_all(descriptions, prompt, checkpoint)
        if failed:
            raise typer.Exit(1)


def _named_images(arguments: list[str]) -> "tuple[list[str], list[SourceShard]]":
    """
    The files and URLs, and the shards, that arguments name.

    Raises:
        ValueError: if there is nothing, or a source cannot be opened.
    """
    from transformers_minigpt4.inference.sources import expand_sources

    from .images import is_source

    files: list[str]
    shards: list[SourceShard] = []
    if any(map(is_source, arguments)):
        from .sources import open_sources  # needs `datasets`, which an environment for vLLM may not have

        files, shards = open_sources(arguments, sys.stdin)
    else:
        files = expand_sources(arguments, sys.stdin)
    if not files and not shards:
        raise ValueError("the list of images is empty; name at least one file, folder or URL")
    return files, shards


def _finish_one(descriptions: "Iterator[Description]", streamed: bool) -> int:
    """Writes one answer to stdout, which may be there already; returns how many images failed."""
    description = next(descriptions)
    if description.error is not None:
        complain(description.error)
        return 1
    echo("" if streamed else str(description.caption))
    return 0


class _Run:
    """
    The images that one command describes, and how far it is.

    Args:
        files: All files and URLs, those that are in `captions` already included.
        shards: The shards, whose images are not known before they are read.
        captions: Where the answers go; by default to stdout.
        how: How to resume or to start again.
    """

    def __init__(
        self, files: list[str], shards: "list[SourceShard]", captions: "CaptionFile | None", how: str
    ) -> None:
        self.shards, self.captions, self.how = shards, captions, how
        self.where = f" in {captions.path}" if captions is not None else ""
        self.done = self.failed = 0
        self.mid_line = False
        self.bar: tqdm[NoReturn] | None = None
        self.remaining = files
        if captions is None:
            return
        self.remaining, still = captions.remaining(files)
        if still:
            images = "1 image" if still == 1 else f"{still} images"
            typer.echo(f"{images} failed before and still cannot be read, see {captions.failures}", err=True)
        if not self.remaining and len(files) > still:
            typer.echo(f"all {'others' if still else f'{len(files)} images'} are{self.where} already", err=True)

    def images(self) -> "Iterator[BulkImage]":
        """What is to be described: the remaining files, then the images of the shards that have no caption yet."""
        from .images import BulkImage

        yield from (BulkImage(file, file) for file in self.remaining)
        done = self.captions.done if self.captions is not None else set()
        for shard in self.shards:
            yield from (image for image in shard.images(whole=False) if image.key not in done)

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
        of = "" if self.shards else f" of {len(self.remaining)}"
        kept = f", now{self.where}" if self.where else ""
        return f"stopped after {self.done}{of} images{kept}; {self.how}"

    def write_all(self, descriptions: "Iterable[Description]", prompt: str, checkpoint: str) -> int:
        """Writes one JSON line per image to the file or stdout; returns how many images failed."""
        from tqdm.auto import tqdm

        from transformers_minigpt4.utils.files import to_json
        from transformers_minigpt4.utils.text import without_control_characters

        from .sinks import caption_record

        total = None if self.shards else len(self.remaining)
        # disable=None: no bar where stderr is a file.
        with tqdm(total=total, unit="image", file=sys.stderr, disable=None) as self.bar:
            for one in descriptions:
                if one.error is not None:
                    self.failed += 1
                    self.bar.write(without_control_characters(f"minigpt4: {one.error}"), file=sys.stderr)
                    self.bar.set_postfix(failed=self.failed)
                else:
                    self.done += 1
                if self.captions is not None:
                    self.captions.write(one)
                elif one.error is None:
                    self.bar.write(to_json(caption_record(one, prompt, checkpoint)), file=sys.stdout)
                    sys.stdout.flush()
                self.bar.update()
        if self.failed or self.captions is not None:
            typer.echo(f"{self.done} described{self.where}, {self.failed} failed", err=True)
        return self.failed
