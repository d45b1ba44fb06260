"""The `evaluate` subcommands of `minigpt4`: runs tasks on a checkpoint, and compares results."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer


if TYPE_CHECKING:
    from transformers_minigpt4.llm.types import ChatSettings


INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
OUTPUTS = Path("minigpt4-evaluation")


class EvaluateGroup(typer.core.TyperGroup):
    """`evaluate CHECKPOINT …` is short for `evaluate run CHECKPOINT …`, and `evaluate --demo` for `evaluate demo`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--demo" in args:
            args = ["demo", *(word for word in args if word not in ("--demo", "run"))]
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


def run(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="Folder or Hub id of an image-text-to-text model of any family, with its processor."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Names with commas between them, such as gqa,chair; see --list-tasks.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of the official files (FOLDER/TASK is taken where it exists), or TASK=PATH, which may be "
            "given again. hub:namespace/name[@revision] is a data set of the Hub."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.json and the answers. By default the checkpoint's own, where `minigpt4 push` "
            "finds them for its card; for a Hub id minigpt4-evaluation/NAME."
        ),
    ] = None,
    list_tasks: Annotated[
        bool, typer.Option("--list-tasks", help="Show the tasks and their files, and exit.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task. By default all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that go through the model at once.")] = 8,
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
    seed: Annotated[int, typer.Option(help="Draws the bootstrap samples of the intervals.")] = 0,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Language model that judges: its name at --judge-url, or a folder or Hub id of a local one."
        ),
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")
    ] = None,
    judge_key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the endpoint's key.")
    ] = "OPENAI_API_KEY",
    judge_concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 8,
    judge_requests_per_minute: Annotated[float | None, typer.Option(help="At most so many.")] = None,
    judge_timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 60.0,
    judge_retries: Annotated[int, typer.Option(min=0, help="Further tries after a fault that may pass.")] = 5,
    judge_budget_tokens: Annotated[int | None, typer.Option(help="Stop before more tokens than these.")] = None,
    judge_budget_cost: Annotated[
        float | None, typer.Option(help="Stop before a higher cost; needs both prices.")
    ] = None,
    judge_price_in: Annotated[float | None, typer.Option(help="Price of a million prompt tokens.")] = None,
    judge_price_out: Annotated[float | None, typer.Option(help="Price of a million answer tokens.")] = None,
    judge_cache: Annotated[
        Path | None,
        typer.Option(help="File of the judge's replies, which are never paid twice. By default in --output."),
    ] = None,
) -> None:
    """
    Ask a model the questions of some tasks, score the answers and write results.json.

    `minigpt4 evaluate CHECKPOINT ...` is short for this. Stopped or broken off, the same command goes on where it was.
    Under `accelerate launch -m transformers_minigpt4.cli` the questions are split over the processes.
    """
    if list_tasks:
        _show_tasks()
        return
    if checkpoint is None:
        raise ValueError("name a CHECKPOINT, or --demo; `minigpt4 evaluate run --help` shows the options")
    if not tasks:
        raise ValueError("name --tasks, such as gqa,chair; --list-tasks shows all")
    if not data:
        raise ValueError("name the --data, a folder of the official files; --list-tasks shows which")
    from .compare import results_table
    from .run import evaluate

    settings = _judge_settings(
        judge,
        base_url=judge_url,
        api_key_env=judge_key_env,
        concurrency=judge_concurrency,
        requests_per_minute=judge_requests_per_minute,
        timeout=judge_timeout,
        max_retries=judge_retries,
        budget_tokens=judge_budget_tokens,
        budget_cost=judge_budget_cost,
        price_in=judge_price_in,
        price_out=judge_price_out,
    )
    names = [name.strip() for entry in tasks for name in entry.split(",") if name.strip()]
    where = output or default_output(checkpoint)
    try:
        results = evaluate(
            checkpoint,
            names,
            _data(data),
            where,
            judge=settings,
            judge_cache=judge_cache,
            batch_size=batch_size,
            limit=limit,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
    except KeyboardInterrupt as interrupt:
        typer.echo(
            f"minigpt4: stopped; the answers are in {where / 'answers'}, run the same command again to go on", err=True
        )
        raise typer.Exit(INTERRUPTED) from interrupt
    if results:
        typer.echo(results_table(results, names))
        typer.echo(f"results in {where / 'results.json'}", err=True)


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="A B...", help="Folders of results, the one that all are compared with first."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the charts and the page.")] = OUTPUTS / "comparison",
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks with commas between them. By default all that every folder has.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Questions of each task on the page.")] = 50,
    seed: Annotated[int, typer.Option(help="Draws the samples and the examples.")] = 0,
) -> None:
    """
    Compare results over the same questions.

    Prints a table in the paper's form, and the paired differences to A with 95 % intervals (bootstrap) and p-values
    (permutation test). Writes a PNG chart a table, and answers.html with pictures and answers side by side.
    """
    from .compare import compare_results, comparison_tables
    from .compare_page import write_charts, write_page

    names = [name.strip() for entry in tasks or () for name in entry.split(",") if name.strip()]
    comparison = compare_results(folders, names or None, seed=seed)
    typer.echo(comparison_tables(comparison))
    for path in [*write_charts(comparison, output), write_page(comparison, output, examples=examples, seed=seed)]:
        typer.echo(f"wrote {path}", err=True)


def default_output(checkpoint: str) -> Path:
    """The folder of a local checkpoint itself; for a Hub id one that is named after it."""
    folder = Path(checkpoint)
    return folder if folder.is_dir() else OUTPUTS / checkpoint.replace("/", "--")


def _data(entries: list[str]) -> str | dict[str, str]:
    """`TASK=PATH` entries as a mapping, or one folder."""
    from .tasks import TASKS

    named = dict(entry.split("=", 1) for entry in entries if entry.split("=", 1)[0] in TASKS and "=" in entry)
    plain = [entry for entry in entries if not ("=" in entry and entry.split("=", 1)[0] in TASKS)]
    if len(plain) > 1 or (plain and named):
        raise ValueError("give either one --data FOLDER, or --data TASK=PATH for each task")
    return plain[0] if plain else named


def _judge_settings(model: str | None, **settings: Any) -> "ChatSettings | None":
    from transformers_minigpt4.llm.types import ChatSettings

    if model is None:
        if settings["base_url"] is not None:
            raise ValueError("--judge-url is given without --judge; name the model to ask there")
        return None
    return ChatSettings(model=model, **settings)


def _show_tasks() -> None:
    from .tasks import TASKS, load_task

    for name in TASKS:
        task = load_task(name)
        judge = "; needs --judge" if task.needs_judge else ""
        typer.echo(f"{name}: {task.description} ({task.paper}{judge})\n    {task.data}")
