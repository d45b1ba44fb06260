"""The `evaluate` subcommands of `minigpt4`: run tasks on a checkpoint, and compare results."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from transformers_minigpt4.utils.command_line import (
    BatchSize,
    ClickContext,
    Device,
    DType,
    EngineOption,
    Group,
    Seed,
    TrustRemoteCode,
    complain,
    interruptible,
    this_command,
)


if TYPE_CHECKING:
    from transformers_minigpt4.llm.types import ChatSettings


OUTPUTS = Path("minigpt4-evaluation")
Tasks: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME,...", help="Tasks, separated by commas, such as gqa,chair; see --list-tasks."),
]


Data: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE",
        help="Folder of the official files (FOLDER/TASK if that exists), or TASK=PATH, which can be repeated. "
        "hub:namespace/name[@revision] is a dataset of the Hub.",
    ),
]
Results: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder for results.json and the answers. By default the checkpoint's own, where `minigpt4 push` "
        "finds them for the card; for a Hub id minigpt4-evaluation/NAME.",
    ),
]


def _judge(*names: str, **keywords: Any) -> object:
    """An option of the judge; the parameters are named after the fields of `ChatSettings`."""
    return typer.Option(*names, rich_help_panel="Judge", **keywords)


JudgeModel: TypeAlias = Annotated[
    str | None,
    _judge(
        "--judge",
        metavar="MODEL",
        help="Language model that judges: its name at --judge-url, or a folder or Hub id of a local one.",
    ),
]
JudgeUrl: TypeAlias = Annotated[
    str | None,
    _judge("--judge-url", metavar="URL", help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1."),
]
JudgeKeyEnv: TypeAlias = Annotated[
    str, _judge("--judge-key-env", metavar="NAME", help="Environment variable that holds the endpoint's key.")
]
JudgeConcurrency: TypeAlias = Annotated[int, _judge(min=1, help="Maximum number of requests at the same time.")]
JudgeRate: TypeAlias = Annotated[float | None, _judge(help="Maximum number of requests per minute.")]
JudgeTimeout: TypeAlias = Annotated[float, _judge(metavar="SECONDS", help="Timeout of a request.")]
JudgeRetries: TypeAlias = Annotated[int, _judge("--judge-retries", min=0, help="Retries after a transient failure.")]
JudgeBudgetTokens: TypeAlias = Annotated[int | None, _judge(help="Stop before more tokens than this are used.")]
JudgeBudgetCost: TypeAlias = Annotated[
    float | None, _judge(help="Stop before the cost exceeds this; needs both prices.")
]
JudgePriceIn: TypeAlias = Annotated[float | None, _judge(help="Price of a million prompt tokens.")]
JudgePriceOut: TypeAlias = Annotated[float | None, _judge(help="Price of a million answer tokens.")]
JudgeCache: TypeAlias = Annotated[
    Path | None,
    _judge(
        metavar="FILE",
        help="Cache of the judge's replies, so that none is paid for twice. By default in --output.",
    ),
]


class EvaluateGroup(Group):
    """`evaluate CHECKPOINT …` is short for `evaluate run CHECKPOINT …`, and `evaluate --demo` for `evaluate demo`."""

    def parse_args(self, ctx: ClickContext, args: list[str]) -> list[str]:
        """Puts the subcommand in front if the short form leaves it out."""
        if "--demo" in args:
            rest = [word for word in args if word not in ("--demo", "run")]
            _refuse_options(rest, ctx.help_option_names)
            args = ["demo", *rest]
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


def _refuse_options(words: list[str], help_options: list[str]) -> None:
    """Ends with one line at the first word that `evaluate demo` does not take."""
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name in ("--output", "--seed") and not equals:
            next(rest, None)  # its value
        elif name not in ("--output", "--seed", *help_options):
            complain(f"--demo has its own model, tasks and data; leave out {name}")
            raise typer.Exit(2)


def run(
    context: typer.Context,
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Folder or Hub id of an image-text-to-text model of any family, with its processor.",
        ),
    ] = None,
    tasks: Tasks = None,
    data: Data = None,
    output: Results = None,
    list_tasks: Annotated[
        bool, typer.Option("--list-tasks", help="Show the tasks and their files, and exit.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task. By default all.")] = None,
    max_new_tokens: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBER",
            help="Longest answer in tokens, or TASK=NUMBER, which can be repeated. By default each task's own.",
        ),
    ] = None,
    engine: EngineOption = "transformers",
    batch_size: BatchSize = None,
    dtype: DType = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    judge_model: JudgeModel = None,
    judge_base_url: JudgeUrl = None,
    judge_api_key_env: JudgeKeyEnv = "OPENAI_API_KEY",
    judge_concurrency: JudgeConcurrency = 8,
    judge_requests_per_minute: JudgeRate = None,
    judge_timeout: JudgeTimeout = 60.0,
    judge_max_retries: JudgeRetries = 5,
    judge_budget_tokens: JudgeBudgetTokens = None,
    judge_budget_cost: JudgeBudgetCost = None,
    judge_price_in: JudgePriceIn = None,
    judge_price_out: JudgePriceOut = None,
    judge_cache: JudgeCache = None,
) -> None:
    """
    Run evaluation tasks on a checkpoint and write results.json.

    `minigpt4 evaluate CHECKPOINT ...` is short for this, and `minigpt4 evaluate --demo` runs the tasks on the demo's
    toy world. If interrupted, rerun the same command to resume. With `accelerate launch -m transformers_minigpt4.cli`
    the questions are split over the processes.

    Examples:
        minigpt4 evaluate my-checkpoint --tasks gqa,chair --data path/to/evaluation-data
        minigpt4 evaluate --list-tasks
    """
    if list_tasks:
        _show_tasks()
        return
    from .tasks import check_names

    if checkpoint is None:
        raise ValueError("name a CHECKPOINT, or --demo; `minigpt4 evaluate run --help` shows the options")
    if not tasks:
        raise ValueError("name --tasks, such as gqa,chair; --list-tasks shows all")
    names = _names(tasks)
    check_names(names)
    if not data:
        raise ValueError("name the --data, a folder of the official files; --list-tasks shows which")
    where = output or default_output(checkpoint)
    answers = where / "answers"
    with interruptible(f"stopped; the answers so far are in {answers}, `{this_command()}` resumes"):
        from .compare import results_table
        from .run import evaluate

        settings = chat_settings(context)
        results = evaluate(
            checkpoint,
            names,
            _data(data),
            where,
            judge=settings,
            judge_cache=judge_cache,
            engine=engine,
            batch_size=batch_size,
            limit=limit,
            max_new_tokens=_lengths(max_new_tokens or []),
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
    if results:
        typer.echo(results_table(results, names))
        typer.echo(f"results in {where / 'results.json'}", err=True)


def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS...", help="Folders of results; all others are compared with the first."),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the charts and the page.")] = OUTPUTS
    / "comparison",
    tasks: Tasks = None,
    examples: Annotated[int, typer.Option(min=0, help="Questions of each task on the page.")] = 50,
    seed: Seed = 0,
) -> None:
    """
    Compare results on the same questions.

    Prints a table in the paper's format, and the paired differences to the first with 95 % intervals (bootstrap) and
    p-values (permutation test). Writes a PNG chart for each table, and answers.html with images and answers side by
    side. By default it compares all tasks that every folder has.

    Examples:
        minigpt4 evaluate compare my-checkpoint other-checkpoint --output comparison
    """
    from .compare import compare_results, comparison_tables, markdown
    from .compare_page import write_charts, write_page

    comparison = compare_results(folders, _names(tasks or []) or None, seed=seed)
    typer.echo(markdown(comparison_tables(comparison)))
    for path in [*write_charts(comparison, output), write_page(comparison, output, examples=examples, seed=seed)]:
        typer.echo(f"wrote {path}", err=True)


def chat_settings(context: typer.Context) -> "ChatSettings | None":
    """
    The judge that a command's options name.

    Raises:
        ValueError: for settings that cannot work.
    """
    from transformers_minigpt4.llm.types import ChatSettings

    if context.params["judge_base_url"] is not None and context.params["judge_model"] is None:
        raise ValueError("--judge-url is given without --judge; name the model to ask there")
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    return ChatSettings.from_options(context.params, "judge_", options)


def reviews(
    files: Annotated[
        list[Path], typer.Argument(metavar="REVIEWS...", help="JSON Lines of LLaVA's review scripts, with tuple.")
    ],
    ignore: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Question to leave out, by question_id; may be repeated.")
    ] = None,
) -> None:
    """
    Summarize review files of LLaVA-Bench.

    Prints what the authors' script does: the relative score in %, and the means of reference and model times 10.
    Reviews that could not be read, scored -1 and -1 by their scripts, are in the means, as there.

    Examples:
        minigpt4 evaluate reviews review_llava-13b.jsonl
    """
    from .compare import markdown_table
    from .llava_reviews import UNREADABLE, read_reviews, summarize_reviews

    rows = []
    for path in files:
        kept = [row for row in read_reviews(path) if row["question_id"] not in (ignore or [])]
        for name, means in summarize_reviews((row["category"], tuple(row["tuple"])) for row in kept).items():
            rows.append([path.stem, name, *(f"{mean:.1f}" for mean in means)])
        unreadable = sum(tuple(row["tuple"]) == UNREADABLE for row in kept)
        if unreadable:
            complain(f"{unreadable} of {len(kept)} reviews of {path} could not be read, and count with -1 and -1")
    typer.echo(markdown_table(["reviews", "category", "relative score (%)", "reference × 10", "model × 10"], rows))


COMMANDS: dict[str, Callable[..., None]] = {"run": run, "compare": compare, "reviews": reviews}


def default_output(checkpoint: str) -> Path:
    """The folder of a local checkpoint itself; for a Hub id, one named after it."""
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


def _lengths(entries: list[str]) -> int | dict[str, int] | None:
    """`TASK=NUMBER` entries as a mapping, or one number for all tasks."""
    if not entries:
        return None
    if not all(entry.rpartition("=")[2].isdecimal() for entry in entries):
        raise ValueError(f"--max-new-tokens is {', '.join(entries)}; give a NUMBER, or TASK=NUMBER for each task")
    named = {entry.partition("=")[0]: int(entry.partition("=")[2]) for entry in entries if "=" in entry}
    if len(named) == len(entries):
        return named
    if len(entries) > 1:
        raise ValueError("give either one --max-new-tokens NUMBER, or --max-new-tokens TASK=NUMBER for each task")
    return int(entries[0])


def _names(entries: list[str]) -> list[str]:
    return [name.strip() for entry in entries for name in entry.split(",") if name.strip()]


def _show_tasks() -> None:
    from .tasks import TASKS, load_task

    for name in TASKS:
        task = load_task(name)
        judge = "; needs --judge" if task.needs_judge else ""
        typer.echo(f"{name}: {task.description} ({task.paper}{judge})\n    {task.data}")
