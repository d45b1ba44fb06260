"""The `instruct` subcommands of `minigpt4`: instruction data from captions and boxes, step by step."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transformers_minigpt4.curation.project_commands import (
    Decided,
    Export,
    Import,
    NewProject,
    ProjectPath,
    Reviewer,
    Unreviewed,
    absolute,
    check_review_options,
    opened,
    review_project,
    write_settings,
)
from transformers_minigpt4.hub import commands as hub
from transformers_minigpt4.utils.command_line import DryRun, Host, Port, Seed


if TYPE_CHECKING:
    from .config import InstructConfig
    from .store import InstructProject


def init(
    project: NewProject,
    captions: Annotated[
        str, typer.Option(metavar="FILE", help="COCO's captions_*.json, or a .jsonl file of your own.")
    ],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Language model: its name at the endpoint, or a folder or Hub id.")
    ],
    instances: Annotated[
        str | None, typer.Option(metavar="FILE", help="COCO's instances_*.json, for the boxes.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of the images. By default the one of --captions.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible endpoint. By default the model runs locally.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARE",
            help="Such as conversation=1, detail_description=1 or complex_reasoning=1; can be repeated.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="NUMBER", help="Rows of all kinds. By default as many as there are images for."),
    ] = None,
    seed: Seed = 42,
) -> None:
    """
    Create a project folder; its instruct.yaml holds every setting.

    Edit the settings before the first request: prices, budget, concurrency, language.

    Examples:
        minigpt4 instruct init my-data --captions captions_train2017.json --instances instances_train2017.json \\
            --images train2017 --model gpt-4o --base-url https://api.openai.com/v1 --limit 100
    """
    from transformers_minigpt4.llm.types import ChatSettings

    from .config import SETTINGS, InstructConfig
    from .prompts import KINDS

    chat = ChatSettings(model, base_url, concurrency=16, temperature=0.7, max_tokens=2048)
    config = InstructConfig(
        captions=absolute(captions),
        instances=absolute(instances) if instances is not None else None,
        images=absolute(images) if images is not None else None,
        chat=chat,
        limit=limit,
        kinds=_shares(kind) if kind else dict(KINDS),
        seed=seed,
    )
    path = write_settings(project, SETTINGS, config)
    typer.echo(f"settings in {path}; edit them, then: minigpt4 instruct generate {project} --dry-run")


def generate(
    project: ProjectPath,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="NUMBER", help="Rows of all kinds. By default as in instruct.yaml."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """
    Have the language model write; ask again where needed.

    Where an answer cannot be used, it is asked for once more. An estimate comes before the first request; --dry-run
    shows the first three requests and the tokens of all. If interrupted, rerun the same command to resume: no answer
    that arrived is paid for again. The exit status is 1 if every row failed.

    Examples:
        minigpt4 instruct generate my-data --dry-run
        minigpt4 instruct generate my-data --limit 100
    """
    from .generate import run_generate

    if dry_run:
        _show_plan(project, limit)
        return
    with _opened(project, create=True) as found:
        config = _limited(found.config, limit)
        done = run_generate(found, config, say=lambda line: typer.echo(line, err=True))
        typer.echo(str(done), err=True)
        done.check()


def check(project: ProjectPath) -> None:
    """
    Refuse unusable answers, and count the reasons.

    Writes report.html, with samples of what was kept and of every reason.

    Examples:
        minigpt4 instruct check my-data
    """
    from .check import run_check, write_page

    with _opened(project) as found:
        typer.echo(str(run_check(found, found.config)), err=True)
        typer.echo(f"report in {write_page(found, found.config)}", err=True)


def review(
    project: ProjectPath,
    export: Export = None,
    import_from: Import = None,
    decided: Decided = False,
    reviewer: Reviewer = None,
    host: Host = "127.0.0.1",
    port: Port = None,
) -> None:
    """
    Accept, edit or reject rows on a local web page or in a file.

    Several people can review at once. The page runs until Ctrl-C; every decision is saved as it is made. The exit
    status is 0 if every row has been decided on, else 130.

    Examples:
        minigpt4 instruct review my-data
        minigpt4 instruct review my-data --export pending.csv
    """
    check_review_options(export, import_from, decided)
    with _opened(project) as found:
        review_project(found, export, import_from, decided, reviewer, host, port)


def build(
    project: ProjectPath,
    unreviewed: Unreviewed = None,
) -> None:
    """
    Write the rows in LLaVA's format and as a dataset, with a card.

    Images are named, not copied.

    Examples:
        minigpt4 instruct build my-data
    """
    from .build import run_build

    with _opened(project) as found:
        typer.echo(str(run_build(found, found.config, unreviewed)), err=True)


def push(
    project: ProjectPath,
    repo_id: hub.RepoId,
    license_id: hub.LicenseId = None,
    license_name: hub.LicenseName = None,
    license_link: hub.LicenseLink = None,
    private: hub.Private = False,
    revision: hub.Revision = None,
    message: hub.Message = None,
    dry_run: DryRun = False,
) -> None:
    """
    Publish the built rows on the Hugging Face Hub, without images.

    Examples:
        minigpt4 instruct push my-data my-name/my-data --license cc-by-4.0 --dry-run
    """
    from .build import built_folder

    with _opened(project) as found:
        folder = built_folder(found)
    hub.push(
        folder,
        repo_id,
        license_id=license_id,
        license_name=license_name,
        license_link=license_link,
        private=private,
        revision=revision,
        message=message,
        dry_run=dry_run,
    )


def status(project: ProjectPath) -> None:
    """
    Show the counts at every step, with reasons, and what was used.

    Examples:
        minigpt4 instruct status my-data
    """
    from transformers_minigpt4.curation.spending import used_so_far
    from transformers_minigpt4.curation.status import status_text

    with _opened(project) as found:
        used = used_so_far(found)
        typer.echo(status_text(found))
        typer.echo(f"used so far: {used.requests:,} requests, {used.tokens:,} tokens, cost {used.cost:.4f}")


# In the order of their use.
COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "generate": generate,
    "check": check,
    "review": review,
    "build": build,
    "push": push,
    "status": status,
}


def _opened(where: Path, create: bool = False) -> "AbstractContextManager[InstructProject]":
    from .store import InstructProject

    return opened(InstructProject, where, create)


def _limited(config: "InstructConfig", limit: int | None) -> "InstructConfig":
    from dataclasses import replace

    return config if limit is None else replace(config, limit=limit)


def _show_plan(where: Path, limit: int | None) -> None:
    from .plan import read_plan

    plan = read_plan(where.parent if where.is_file() else where, limit)
    for number, (key, messages) in enumerate(plan.requests, start=1):
        typer.echo(f"=== request {number} of {plan.estimate.requests:,}: {key}\n")
        for message in messages:
            typer.echo(f"--- {message['role']}\n{message['content']}\n")
    typer.echo(f"{plan.summary}\nnothing was sent; all would be {plan.estimate}")


def _shares(words: list[str]) -> dict[str, float]:
    """
    Raises:
        ValueError: for words that are no kinds with shares.
    """
    shares: dict[str, float] = {}
    for word in words:
        name, equals, share = word.partition("=")
        try:
            shares[name] = float(share) if equals else 1.0
        except ValueError:
            raise ValueError(f"--kind is {word!r}; write KIND=SHARE, such as conversation=1") from None
    return shares
