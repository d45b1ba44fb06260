"""The `push` subcommand of `minigpt4`, and the options of publishing."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from transformers_minigpt4.utils.command_line import DryRun, interruptible, this_command


if TYPE_CHECKING:
    from .upload import Publication, Published


LicenseId: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--license",
        metavar="ID",
        help="The Hub's identifier, such as cc-by-4.0. By default what the recorded sources allow.",
    ),
]
LicenseName: TypeAlias = Annotated[
    str | None, typer.Option("--license-name", metavar="NAME", help="Name of the license, with --license other.")
]
LicenseLink: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--license-link", metavar="LINK", help="URL or file name of the license's text, with --license other."
    ),
]
Message: TypeAlias = Annotated[
    str | None, typer.Option("--message", metavar="TEXT", help="First line of the commit message.")
]
Private: TypeAlias = Annotated[bool, typer.Option("--private", help="Create the repository as private.")]
RepoId: TypeAlias = Annotated[str, typer.Argument(metavar="REPO_ID", help="namespace/name on the Hub.")]
Revision: TypeAlias = Annotated[
    str | None,
    typer.Option("--revision", metavar="BRANCH", help="Branch, created if it does not exist. By default main."),
]


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A checkpoint, full or of trained modules only; a PEFT adapter; or a dataset such as cc_sbu_align.",
        ),
    ],
    repo_id: RepoId,
    license_id: LicenseId = None,
    license_name: LicenseName = None,
    license_link: LicenseLink = None,
    language: Annotated[
        list[str] | None, typer.Option(metavar="CODE", help="ISO code of the texts; can be repeated. By default en.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Markdown file to use as the card, instead of a generated one.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="REPO_ID",
            help="For an adapter or trained modules: where their local base is on the Hub, namespace/name[@revision].",
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Publish the full model that an adapter or trained modules make.")
    ] = False,
    private: Private = False,
    revision: Revision = None,
    message: Message = None,
    dry_run: DryRun = False,
) -> None:
    """
    Publish a checkpoint or a dataset on the Hugging Face Hub.

    Everything goes in one commit: readers see the old state or the new one. If interrupted, rerun the same command to
    resume. --dry-run shows files, sizes and card without sending anything. Log in first with `hf auth login`, or set
    HF_TOKEN.

    Examples:
        minigpt4 push my-checkpoint my-name/my-minigpt4 --license llama2 --dry-run
        minigpt4 push my-checkpoint my-name/my-minigpt4 --license llama2 --private
        minigpt4 push my-adapter my-name/my-adapter --license llama2 --base my-name/my-minigpt4
    """
    with interruptible(f"stopped before anything became visible; `{this_command()}` resumes"):
        import tempfile

        from .cards import License
        from .publish import prepare
        from .upload import publish

        if license_id is None and (license_name or license_link):
            raise ValueError("--license-name and --license-link go with --license other")
        license = License(license_id, license_name, license_link) if license_id is not None else None
        text = card.read_text(encoding="utf-8") if card is not None else None
        # Merged weights are as large as the model, and a temporary folder may be in memory.
        near = folder.resolve().parent if merge and folder.is_dir() else None
        with tempfile.TemporaryDirectory(prefix=".minigpt4-push-", dir=near) as scratch:
            publication = prepare(
                folder,
                repo_id,
                Path(scratch),
                license=license,
                language=language or ("en",),
                card=text,
                base=base,
                merge=merge,
            )
            if dry_run:
                _show(publication, private, revision)
                return
            # In a thread, because huggingface_hub waits for uploads under way before it lets Ctrl-C through.
            published = _in_thread(
                lambda: publish(publication, private=private, revision=revision, commit_message=message)
            )
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
    visibility = "private" if private else "public, unless it exists already or your organization decides otherwise"
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
