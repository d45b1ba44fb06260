"""The `convert` and `verify` subcommands of `minigpt4`: making a checkpoint of released weights, and checking one."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def convert(
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    vision: Annotated[
        str,
        typer.Option(
            help="A BLIP-2 in transformers format, eva_vit_g.pth, or a tower such as SigLIP-2; path or Hub id."
        ),
    ],
    language_model: Annotated[
        str, typer.Option(help="Language model with its tokenizer; with --delta, the LLaMA that the delta is for.")
    ],
    projector: Annotated[
        str, typer.Option(help="An authors' checkpoint, or fresh for a projection to be trained.")
    ] = "fresh",
    qformer: Annotated[
        str | None,
        typer.Option(
            help="A BLIP-2, blip2_pretrained_flant5xxl.pth, fresh or none. By default that of a BLIP-2 in --vision."
        ),
    ] = None,
    delta: Annotated[str | None, typer.Option(help="Vicuna delta to add to the language model.")] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="vicuna_v0, llama_2, or a Jinja file. By default the tokenizer's own, else vicuna_v0."),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="auto: as each source is stored. The projection is always float32."),
    ] = "auto",
    projector_layers: Annotated[int, typer.Option(help="1, or 3 as in the paper's variant; of a fresh one.")] = 1,
    projector_hidden_act: Annotated[
        str | None, typer.Option(help="Activation between 3 layers, such as gelu. By default none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws what is fresh.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
) -> None:
    """
    Make a checkpoint of released weights.

    Sources are files, folders or Hub ids (namespace/name, or namespace/name@revision). The folder appears when it is
    complete. Check it with `minigpt4 verify`.
    """
    from .convert import convert_checkpoint

    if chat_template is not None and Path(chat_template).is_file():
        chat_template = Path(chat_template).read_text(encoding="utf-8")
    path = convert_checkpoint(
        output,
        vision=vision,
        language_model=language_model,
        qformer=qformer,
        projector=projector,
        delta=delta,
        chat_template=chat_template,
        dtype=dtype,
        projector_layers=projector_layers,
        projector_hidden_act=projector_hidden_act,
        seed=seed,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        show_progress=True,
    )
    typer.echo(path)


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a MiniGPT-4 checkpoint.")],
    sentences: Annotated[
        Path | None,
        typer.Option(help="Text file, one sentence a line, for a language model that does not speak English."),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], typer.Option(help="auto: as the checkpoint is stored.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> None:
    """
    Check a checkpoint, and say what is wrong with it.

    Exit status 1 when a check failed; warnings leave it at 0.
    """
    from .verify import SENTENCES, verify_checkpoint

    lines: tuple[str, ...] | list[str] = SENTENCES
    if sentences is not None:
        lines = [line for line in sentences.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{sentences} is empty; write one sentence a line")
    report = verify_checkpoint(checkpoint, sentences=lines, dtype=dtype, device=device)
    typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)
