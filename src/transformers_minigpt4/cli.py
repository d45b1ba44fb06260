"""The `minigpt4` command; each subcommand imports what it needs, so that help is quick."""

import contextlib
import io
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from transformers_minigpt4.conversion.commands import convert, verify
from transformers_minigpt4.curation.commands import COMMANDS as CURATION_COMMANDS
from transformers_minigpt4.demo.commands import evaluate_demo
from transformers_minigpt4.evaluation import commands as evaluation
from transformers_minigpt4.evaluation.human_commands import COMMANDS as JUDGING_COMMANDS
from transformers_minigpt4.hub.commands import push
from transformers_minigpt4.training.commands import CONTEXT_SETTINGS, features, train
from transformers_minigpt4.training.data_commands import check


if TYPE_CHECKING:
    from transformers_minigpt4.inference.describe import CaptionFile


INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
_ENV_PACKAGES = (
    *("transformers_minigpt4", "torch", "transformers", "trl", "peft", "datasets", "accelerate"),
    *("safetensors", "huggingface_hub", "tokenizers", "pillow"),
)

app = typer.Typer(
    name="minigpt4",
    help="MiniGPT-4 for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the `minigpt4` command and exit with its status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # JSON is UTF-8 whatever the locale, and a caption of a character that it lacks must not end the run.
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        app()
    except SystemExit as exit_:
        if exit_.code == INTERRUPTED:
            # Python would wait at exit for the threads that still hang on a slow download.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(_version("transformers_minigpt4"))
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show library messages and the trace of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    context.obj = debug


@contextlib.contextmanager
def _one_line_errors(context: typer.Context) -> Iterator[None]:
    """Turn whatever goes wrong into one line on stderr and exit status 1; with `--debug`, let the trace through."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        if context.obj:
            raise
        _complain(_first_line(error))
        raise typer.Exit(1) from error


class _Command(typer.core.TyperCommand):
    """A subcommand whose errors are one line, and during which libraries are quiet."""

    def invoke(self, ctx: Any) -> Any:
        with _one_line_errors(ctx):
            _quieten_libraries(ctx.obj)
            return super().invoke(ctx)


def _complain(message: str) -> None:
    typer.echo(f"minigpt4: {message}", err=True)


def _first_line(error: BaseException) -> str:
    """The first line of an error that speaks for itself, with the type in front where it may not."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name, because torch need not be imported yet
        return "the device is out of memory; lower --batch-size, or set --dtype bfloat16, or spread with --device auto"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if type(error) in (ValueError, OSError) or type(error).__module__.startswith("transformers_minigpt4"):
        return line or type(error).__name__
    return f"{type(error).__name__}: {line} (`minigpt4 --debug ...` shows the trace)"


def _quieten_libraries(debug: bool) -> None:
    if debug:
        return
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # That silenced downloads too, and ten gigabytes without a sign of life look like a hang.
    enable_progress_bars()


@app.command(cls=_Command)
def describe(
    images: Annotated[
        list[str],
        typer.Argument(metavar="PICTURE...", help="Files, folders, URLs, or - for a list on standard input."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of an image-text-to-text model. By default what `minigpt4 demo` made last."
        ),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What to ask about each picture.")] = "Describe this image in detail.",
    output: Annotated[
        Path | None,
        typer.Option(help="JSON Lines file to append to; a second run goes on where the first one stopped."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that go through the model at once.")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. By default the checkpoint's setting, else 300.")
    ] = None,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample/--greedy",
            help="Draw answers as the authors' chat does, or take the likeliest words, the same in each run.",
        ),
    ] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as the checkpoint is stored.")
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(help="Such as cpu or cuda:1; auto spreads the model over all GPUs. By default the first GPU."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let code that comes with the checkpoint run.")
    ] = False,
) -> None:
    """
    Describe pictures.

    One picture is described word by word on the screen. Several give one JSON line each, on standard output or
    appended to --output: {"image", "caption", "prompt", "model"}. A picture that fails is reported and skipped, and
    the exit status is then 1; run again with the same --output, it is tried once more.
    """
    with contextlib.ExitStack() as stack:
        from transformers_minigpt4.inference.describe import CaptionFile
        from transformers_minigpt4.inference.loading import load_model_and_processor
        from transformers_minigpt4.inference.sources import expand_sources

        sources = expand_sources(images, sys.stdin)
        if not sources:
            raise ValueError("the list of pictures is empty; name at least one file, folder or URL")
        checkpoint = model or _demo_checkpoint()
        captions = stack.enter_context(CaptionFile(output, prompt, checkpoint)) if output else None
        todo = [source for source in sources if captions is None or source not in captions.done]
        if captions is not None and not todo:
            typer.echo(f"all {len(sources)} pictures are in {output} already", err=True)
            return
        loaded, processor = load_model_and_processor(checkpoint, dtype, device, trust_remote_code)
        settings: dict[str, Any] = {"prompt": prompt, "do_sample": sample, "batch_size": batch_size}
        if max_new_tokens is not None:
            settings["max_new_tokens"] = max_new_tokens
        if len(sources) == 1 and captions is None:
            failed = _describe_one(todo[0], loaded, processor, settings)
        else:
            failed = _describe_many(todo, loaded, processor, settings, captions, checkpoint)
        if failed:
            raise typer.Exit(1)


def _kept_demo_checkpoint() -> Path:
    """Where `demo` leaves a copy of its model and `describe` finds it, whatever folder either is called in."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "minigpt4-demo" / "checkpoint"


def _keep_demo_checkpoint(checkpoint: Path) -> None:
    kept = _kept_demo_checkpoint()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        # Renaming swaps the folder as a whole; a copy stopped halfway must not become the default model.
        shutil.copytree(checkpoint, Path(scratch) / "new")
        if kept.exists():
            kept.rename(Path(scratch) / "old")
        (Path(scratch) / "new").rename(kept)


def _demo_checkpoint() -> str:
    checkpoint = _kept_demo_checkpoint()
    if not (checkpoint / "config.json").is_file():
        raise ValueError(
            f"there is no model in {str(checkpoint)!r}; run `minigpt4 demo`, which makes one, or name one with --model"
        )
    return str(checkpoint)


def _describe_one(source: str, model: Any, processor: Any, settings: dict[str, Any]) -> int:
    """Stream one answer to stdout; returns how many pictures failed."""
    from transformers_minigpt4.inference.describe import describe as describe_images
    from transformers_minigpt4.inference.streaming import CaptionStreamer

    streamer = CaptionStreamer(processor, lambda text: typer.echo(text, nl=False))
    settings = {**settings, "batch_size": 1, "streamer": streamer}
    (record,) = describe_images([source], model, processor, **settings)
    if "error" in record:
        _complain(record["error"])
        return 1
    typer.echo()
    return 0


def _describe_many(
    sources: list[str],
    model: Any,
    processor: Any,
    settings: dict[str, Any],
    captions: "CaptionFile | None",
    checkpoint: str,
) -> int:
    """Write one JSON line a picture to `captions` or stdout; returns how many pictures failed."""
    from tqdm.auto import tqdm

    from transformers_minigpt4.inference.describe import describe as describe_images
    from transformers_minigpt4.utils.files import to_json

    done = failed = 0
    where = f" in {captions.path}" if captions is not None else ""
    # disable=None: no bar where stderr is a file.
    with tqdm(total=len(sources), unit="image", file=sys.stderr, disable=None) as bar:
        try:
            for record in describe_images(sources, model, processor, **settings):
                if "error" in record:
                    failed += 1
                    bar.write(f"minigpt4: {record['error']}", file=sys.stderr)
                    bar.set_postfix(failed=failed)
                else:
                    done += 1
                    if captions is not None:
                        captions.append(record)
                    else:
                        line = to_json({**record, "prompt": settings["prompt"], "model": checkpoint})
                        bar.write(line, file=sys.stdout)
                        sys.stdout.flush()
                bar.update()
        except KeyboardInterrupt as interrupt:
            bar.close()
            again = f", which are{where}; run the same command again to go on" if captions is not None else ""
            _complain(f"stopped after {done} of {len(sources)} pictures{again}")
            raise typer.Exit(INTERRUPTED) from interrupt
    if failed or captions is not None:
        typer.echo(f"{done} described{where}, {failed} failed", err=True)
    return failed


@app.command(cls=_Command)
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where checkpoints, pictures and results go.")] = Path(
        "minigpt4-demo"
    ),
    seed: Annotated[int, typer.Option(help="Draws the projection, the pictures and the order of training.")] = 0,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Then train the paper's variants (a), (b), (c) too and compare.")
    ] = False,
) -> None:
    """
    Train a tiny MiniGPT-4 in both stages on drawn pictures.

    It needs neither GPU nor downloads. `minigpt4 describe` then uses the result wherever no --model is named.
    """
    from transformers_minigpt4.demo.run import run_demo

    run_demo(output_dir, seed=seed)
    _keep_demo_checkpoint(output_dir / "checkpoint")
    if ablations:
        from transformers_minigpt4.demo.ablations import run_ablations

        run_ablations(output_dir, seed=seed)


@app.command(cls=_Command)
def env() -> None:
    """Show versions and devices, to be copied into a bug report."""
    import torch

    rows = {name: _version(name) for name in _ENV_PACKAGES}
    rows["python"] = platform.python_version()
    rows["platform"] = platform.platform()
    rows["cpu count"] = str(os.cpu_count())
    rows["cuda"] = str(torch.version.cuda or "not in this build of torch")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    rows["device"] = str(accelerator) if accelerator is not None else "cpu"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    for name, value in rows.items():
        typer.echo(f"{name}: {value}")


@app.command(cls=_Command)
def merge(
    source: Annotated[str, typer.Argument(help="Checkpoint of trained parts, or folder of a PEFT adapter.")],
    output: Annotated[Path, typer.Argument(help="New folder for the full model.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as the base is stored.")
    ] = "auto",
) -> None:
    """Write the full model of a checkpoint that holds trained parts alone."""
    from transformers_minigpt4.conversion.merge import merge_checkpoint

    merge_checkpoint(source, output, dtype)
    typer.echo(f"full model in {output}", err=True)


for command in (convert, verify, push):
    app.command(cls=_Command)(command)

for recipe_command in (train, features):
    app.command(cls=_Command, context_settings=CONTEXT_SETTINGS)(recipe_command)


def _add_group(
    name: str,
    help: str,
    commands: dict[str, Any],
    cls: type[typer.core.TyperGroup] = typer.core.TyperGroup,
    parent: typer.Typer = app,
) -> typer.Typer:
    group = typer.Typer(cls=cls, help=help, no_args_is_help=True, rich_markup_mode=None)
    group.callback()(lambda: None)  # keeps a subcommand one although it is the only one
    for command_name, function in commands.items():
        group.command(command_name, cls=_Command)(function)
    parent.add_typer(group, name=name)
    return group


_add_group("data", "Look at training data.", {"check": check})
_add_group("curate", "Make a stage-2 data set: describe, repair, filter, review, build, push.", CURATION_COMMANDS)
evaluate_group = _add_group(
    "evaluate",
    "Measure a checkpoint: `evaluate CHECKPOINT --tasks ...` is short for `evaluate run CHECKPOINT --tasks ...`.",
    {"run": evaluation.run, "compare": evaluation.compare, "demo": evaluate_demo},
    evaluation.EvaluateGroup,
)
_add_group("people", "Let people judge answers of the task advanced, blind.", JUDGING_COMMANDS, parent=evaluate_group)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
