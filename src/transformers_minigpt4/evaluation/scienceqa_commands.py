"""The `evaluate scienceqa` subcommands of `minigpt4`: a text-only model's answers, and ensembles of files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from transformers_minigpt4.data.commands import ScienceQAFormat, ScienceQASplit
from transformers_minigpt4.utils.command_line import complain, interruptible, this_command

from .commands import (
    JudgeBudgetCost,
    JudgeBudgetTokens,
    JudgeCache,
    JudgeConcurrency,
    JudgeKeyEnv,
    JudgeModel,
    JudgePriceIn,
    JudgePriceOut,
    JudgeRate,
    JudgeRetries,
    JudgeTimeout,
    JudgeUrl,
    chat_settings,
)


Release = Annotated[
    Path,
    typer.Option("--release", metavar="FOLDER", help="ScienceQA's release; the images are not needed."),
]


def text(
    context: typer.Context,
    data: Release,
    output: Annotated[Path, typer.Option(metavar="FILE", help="JSON Lines file for the answers.")],
    split: ScienceQASplit = "test",
    prompt_format: ScienceQAFormat = "QCM-ALE",
    limit: Annotated[int | None, typer.Option(min=1, help="Number of questions. By default all.")] = None,
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
    Ask a text-only language model all questions after two examples.

    The messages are those of LLaVA's repository. --judge names the model. If interrupted, rerun the same command to
    resume: replies are kept next to the answers.

    Examples:
        minigpt4 evaluate scienceqa text --release /data/scienceqa --output gpt4.jsonl \\
            --judge gpt-4 --judge-url https://api.openai.com/v1
    """
    settings = chat_settings(context)
    if settings is None:
        raise ValueError("name the text-only model with --judge, and its endpoint with --judge-url")
    with interruptible(f"stopped; the replies so far are kept, `{this_command()}` resumes"):
        from transformers_minigpt4.data.scienceqa import FORMATS
        from transformers_minigpt4.llm.opening import open_chat_model

        from .scienceqa_files import text_baseline, write_answers

        if prompt_format not in FORMATS:
            raise ValueError(f"there is no format {prompt_format!r}; the formats are {', '.join(FORMATS)}")
        with open_chat_model(settings, judge_cache or output.with_suffix(".sqlite")) as model:
            answers, accuracies = text_baseline(data, model, split, prompt_format, limit)
        write_answers(output, answers)
    typer.echo(_table({settings.model: accuracies}))
    typer.echo(f"answers in {output}", err=True)


def ensemble(
    context: typer.Context,
    own: Annotated[Path, typer.Argument(metavar="OWN", help="Answers of the model that saw the images.")],
    text_answers: Annotated[Path, typer.Argument(metavar="TEXT", help="Answers of the text-only model.")],
    data: Release,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for ensemble.json and the rows.")],
    judge_answers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Answers of a judge that was asked before, in place of --judge."),
    ] = None,
    split: ScienceQASplit = "test",
    bare_letters: Annotated[
        bool,
        typer.Option(
            "--bare-letters", help="Read the letter alone in OWN as well, which the authors' scripts do not."
        ),
    ] = False,
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
    Combine two files of answers: by complement, and with a judge.

    Files are JSON Lines with question_id and text (LLaVA's) or id and answer (ours), or JSON with texts by id
    (ScienceQA's). Answers are read as by LLaVA's scripts, but nothing is drawn at random. The judge is asked where the
    text-only model names another option; its prompt is ours, because the authors' is unpublished.

    Examples:
        minigpt4 evaluate scienceqa ensemble results/answers/scienceqa.jsonl gpt4.jsonl --release /data/scienceqa \\
            --output ensemble --judge gpt-4 --judge-url https://api.openai.com/v1
    """
    settings = chat_settings(context)
    if settings is not None and judge_answers is not None:
        raise ValueError("--judge and --judge-answers are given; leave one out")
    with interruptible(f"stopped; the replies so far are kept, `{this_command()}` resumes"):
        from contextlib import nullcontext

        from transformers_minigpt4.llm.opening import open_chat_model

        from . import scienceqa_files as files
        from .scienceqa_ensembles import as_sentence

        images, texts = files.read_answers(own), files.read_answers(text_answers)
        if bare_letters:
            images = {pid: as_sentence(answer) for pid, answer in images.items()}
        judged = files.read_answers(judge_answers) if judge_answers is not None else None
        opened = (
            nullcontext() if settings is None else open_chat_model(settings, judge_cache or output / "judge.sqlite")
        )
        with opened as judge:
            results = files.ensemble(data, images, texts, output, split=split, judge=judge, judged=judged)
    typer.echo(_table(results["accuracy"]))
    published = results["as_published"]
    typer.echo(
        f"\nas the authors count, over the {published['questions']} questions that both files answer: "
        + ", ".join(f"{name} {published[name]:.2f}" for name in (*results["accuracy"], "upper_bound"))
    )
    typer.echo("unanswered: " + ", ".join(f"{name} {count}" for name, count in results["unanswered"].items()))
    for name, count in (("own", results["own_missing"]), ("text", results["text_missing"])):
        if count:
            complain(f"{count} of {results['questions']} questions are not in the file of {name}; they count as wrong")
    for note in results["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(f"results in {output / files.RESULTS}", err=True)


COMMANDS: dict[str, Callable[..., None]] = {"text": text, "ensemble": ensemble}


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    from .compare import markdown_table

    columns = list(dict.fromkeys(name for values in rows.values() for name in values))
    cells = [[name, *(f"{values[c]:.2f}" if c in values else "" for c in columns)] for name, values in rows.items()]
    return markdown_table(["accuracy in %", *columns], cells)
