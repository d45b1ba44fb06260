"""The `convert`, `verify` and `merge` subcommands of `minigpt4`."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from transformers_minigpt4.utils.command_line import Device, DType, Overwrite, Seed


PresetName: TypeAlias = Literal[
    "vicuna-7b",
    "vicuna-13b",
    "llama2-7b",
    "vicuna-7b-base",
    "vicuna-7b-no-qformer-base",
    "vicuna-7b-three-layers-base",
    "llama2-7b-base",
    "siglip2-qwen3-base",
    "siglip2-smollm3-base",
    "llava-vicuna-7b-base",
    "llava15-vicuna-7b-base",
    "llava15-7b",
]
Architecture: TypeAlias = Literal["minigpt4", "llava"]


def convert(
    context: typer.Context,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the checkpoint.")],
    preset: Annotated[
        PresetName | None,
        typer.Option(
            help="Fill in the released parts of a model; options that are given replace its values. The names with "
            "base have an untrained projector, for the recipes."
        ),
    ] = None,
    architecture: Annotated[
        Architecture, typer.Option(help="Model to compose; a preset of LLaVA implies llava.")
    ] = "minigpt4",
    vision: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="A BLIP-2 in transformers format, eva_vit_g.pth, or a tower such as SigLIP-2. For LLaVA, a CLIP.",
        ),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Language model with its tokenizer; with --delta, the LLaMA that the delta is for. For LLaVA also a "
            "complete checkpoint of its authors.",
        ),
    ] = None,
    projector: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="An authors' checkpoint (for LLaVA, mm_projector.bin), or fresh for an untrained projector.",
        ),
    ] = "fresh",
    qformer: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="A BLIP-2, blip2_pretrained_flant5xxl.pth, fresh or none. By default that of a BLIP-2 in --vision.",
        ),
    ] = None,
    delta: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Vicuna delta to add to the language model.")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE",
            help="vicuna_v0, llama_2, or a Jinja file. By default the tokenizer's own, else vicuna_v0. For LLaVA its "
            "prompt format: llava_v0, llava_v1 (default), llava_llama_2 …",
        ),
    ] = None,
    dtype: DType = "auto",
    projector_layers: Annotated[
        int,
        typer.Option(help="Linear layers of a fresh projector: 1, or 3 as in the paper's variant. For LLaVA 1 or 2."),
    ] = 1,
    projector_hidden_act: Annotated[
        str | None, typer.Option(metavar="NAME", help="Activation between 3 layers, such as gelu. By default none.")
    ] = None,
    pad_images: Annotated[
        bool | None, typer.Option(help="LLaVA: pad images to squares, as version 1.5. By default as its config says.")
    ] = None,
    seed: Seed = 0,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Maximum size of a weights file.")] = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """
    Compose a checkpoint from released weights.

    A SOURCE is a file, a folder or a Hub id (namespace/name, or namespace/name@revision). The projector is always
    stored in float32. The folder appears when it is complete; check it with `minigpt4 verify`.

    Examples:
        minigpt4 convert --preset vicuna-7b --output minigpt4-vicuna-7b
        minigpt4 convert --preset llava-vicuna-7b-base --output llava-vicuna-7b-base
        minigpt4 convert --output minigpt4-vicuna-7b --vision Salesforce/blip2-flan-t5-xxl \\
            --language-model path/to/vicuna-7b-v0 --projector pretrained_minigpt4_7b.pth
    """
    from .presets import LLAVA_PRESETS, fill_in, fill_in_llava

    # The rest keeps the defaults of `convert_checkpoint`, which are those above.
    given = {
        name: value
        for name, value in context.params.items()
        if name not in ("output", "preset", "architecture")
        and getattr(context.get_parameter_source(name), "name", None) != "DEFAULT"
    }
    if architecture == "llava" or preset in LLAVA_PRESETS:
        llava_options: dict[str, Any] = fill_in_llava(preset, given)

        from .llava import convert_llava

        typer.echo(convert_llava(output, show_progress=True, **llava_options))
        return
    if "pad_images" in given:
        raise ValueError("--pad-images is for LLaVA; add --architecture llava, or leave it out")
    options: dict[str, Any] = fill_in(preset, given)
    if chat_template is not None and Path(chat_template).is_file():
        options["chat_template"] = Path(chat_template).read_text(encoding="utf-8")

    from .convert import convert_checkpoint

    typer.echo(convert_checkpoint(output, show_progress=True, **options))


def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or Hub id of a LLaVA.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="File to write, such as mm_projector.bin.")],
    overwrite: Overwrite = False,
) -> None:
    """
    Write the projector of a LLaVA in its authors' format.

    Examples:
        minigpt4 export output/llava_stage1 --output mm_projector.bin
    """
    from .llava import export_projector

    typer.echo(export_projector(checkpoint, output, overwrite))


def verify(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder or Hub id of a MiniGPT-4 or a LLaVA.")
    ],
    sentences: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text file with one sentence per line, for a language model without English."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Captioned images: a folder with metadata.jsonl, or a JSON Lines or CSV file. By default, emoji.",
        ),
    ] = None,
    dtype: DType = "auto",
    device: Device = None,
) -> None:
    """
    Check a checkpoint, and report what is wrong with it.

    The exit status is 1 when a check failed; warnings leave it at 0.

    Examples:
        minigpt4 verify minigpt4-vicuna-7b
        minigpt4 verify my-checkpoint --images my-photographs
        minigpt4 verify my-checkpoint --sentences german.txt --device cuda
    """
    from .verify import verify_checkpoint

    lines: list[str] | None = None
    if sentences is not None:
        lines = [line for line in sentences.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{sentences} is empty; write one sentence per line")
    report = verify_checkpoint(checkpoint, sentences=lines, images=images, dtype=dtype, device=device)
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)


def merge(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="Checkpoint of trained modules only, or the folder of a PEFT adapter."
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the full model.")],
    dtype: DType = "auto",
    overwrite: Overwrite = False,
) -> None:
    """
    Merge trained modules or an adapter with their base checkpoint.

    Examples:
        minigpt4 merge my-stage2 --output my-stage2-full
    """
    from .merge import merge_checkpoint

    typer.echo(merge_checkpoint(checkpoint, output, dtype, overwrite=overwrite))
