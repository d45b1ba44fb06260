"""The `push` subcommand of `minigpt4`: publishes a checkpoint or a data set on the Hub."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import typer


if TYPE_CHECKING:
    from .upload import Publication, Published


INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


def push(
    folder: Annotated[
        Path, typer.Argument(help="A checkpoint, whole or of trained parts; or a data set, such as cc_sbu_align.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="namespace/name on the Hub.")],
    license_id: Annotated[
        str | None,
        typer.Option("--license", help="The Hub's identifier. By default what the recorded bases' licences leave."),
    ] = None,
    license_name: Annotated[str | None, typer.Option(help="Name of the licence, with --license other.")] = None,
    license_link: Annotated[
        str | None, typer.Option(help="URL of its text, or a file of the folder, with --license other.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="ISO code of the texts; may be given again. By default en.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="Markdown file to use as it stands, in place of the card made from the facts.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Trained parts alone: where their local base is on the Hub, namespace/name[@revision]."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made where it does not exist. By default main.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files, sizes and card, and do not touch the network.")
    ] = False,
) -> None:
    """
    Publish a checkpoint or a data set on the Hugging Face Hub.

    All goes in one commit: readers see the old state or the new one. Stopped or broken off, the same command goes on
    where it was. Log in first with `hf auth login`, or set HF_TOKEN.
    """
    import tempfile

    from .cards import Licence
    from .publish import prepare
    from .upload import publish

    if license_id is None and (license_name or license_link):
        raise ValueError("--license-name and --license-link go with --license other")
    licence = Licence(license_id, license_name, license_link) if license_id is not None else None
    text = card.read_text(encoding="utf-8") if card is not None else None
    with tempfile.TemporaryDirectory() as scratch:
        publication = prepare(
            folder, repo_id, Path(scratch), licence=licence, language=language or ("en",), card=text, base=base
        )
        if dry_run:
            _show(publication, private, revision)
            return
        try:
            # In a thread, because huggingface_hub waits for uploads under way before it lets Ctrl-C through.
            published = _in_thread(
                lambda: publish(publication, private=private, revision=revision, commit_message=message)
            )
        except KeyboardInterrupt as interrupt:
            typer.echo(
                "minigpt4: stopped, and nothing of it is visible; run the same command again to go on", err=True
            )
            raise typer.Exit(INTERRUPTED) from interrupt
    for name in published.removed:
        typer.echo(f"removed {name}, which this {publication.repo_type} does not have", err=True)
    typer.echo(published.url)


def _in_thread(action: "Callable[[], Published]") -> "Published":
    """Runs `action` in a thread that does not keep the process from ending, and returns or raises what it does."""
    outcome: Future[Published] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()
    return outcome.result()


def _show(publication: "Publication", private: bool, revision: str | None) -> None:
    visibility = "private" if private else "public, unless it exists or your organisation decides otherwise"
    typer.echo(f"would publish the {publication.repo_type} {publication.repo_id} ({visibility})")
    typer.echo(f"in one commit on {revision or 'main'}:\n")
    sizes = publication.sizes
    for name, size in sizes.items():
        typer.echo(f"  {_size(size):>9}  {name}")
    typer.echo(f"  {_size(sum(sizes.values())):>9}  in {len(sizes)} files")
    if publication.left_out:
        typer.echo("\nleft out:\n")
        for name, reason in publication.left_out.items():
            typer.echo(f"  {name}: {reason}")
    typer.echo(f"\nthe card:\n\n{publication.card}")


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
