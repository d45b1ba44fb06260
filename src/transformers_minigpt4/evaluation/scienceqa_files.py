"""ScienceQA from files of answers: a text-only model's answers, and ensembles of any two files with a judge."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from transformers_minigpt4.data.scienceqa import find_problems, read_split
from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.utils.files import JsonObject, atomic_file, to_json, write_json
from transformers_minigpt4.utils.json_files import brief, json_lines, read_json

from .evaluator import Record, columns_of, mean
from .scienceqa_ensembles import (
    JUDGE_PROMPT,
    JUDGE_PROMPT_NOTE,
    TWO_SHOT_FORMAT,
    ask_judge,
    ask_text_model,
    combine,
    reference,
)
from .tasks.scienceqa import COLUMNS, check_examples, groups_of, read_examples


RESULTS, ROWS, JUDGED = "ensemble.json", "ensemble.jsonl", "judge.jsonl"
# The columns of the papers' tables, in their order.
TABLE = {
    **dict(zip(("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12"), COLUMNS.values())),
    "all": None,
}
PARTS = ("own", "text", "complement", "judge")
UNANSWERED_NOTE = (
    "where the authors' scripts draw an option at random (no letter can be read, or it is none of the options), the "
    "question counts as unanswered, which is wrong"
)
_IDS, _TEXTS = ("question_id", "id"), ("text", "answer")


def read_answers(path: Path) -> dict[str, str]:
    """
    Answers by id, without the questions that failed.

    Files are JSON Lines with `question_id` and `text` (LLaVA's) or `id` and `answer` (of `answers/`), or JSON, an
    object of texts by id, which may be under `outputs` (ScienceQA's).

    Raises:
        ValueError: for a file of another format, and for an id that occurs twice.
        OSError: if it cannot be read.
    """
    if path.suffix == ".json":
        content = read_json(path)
        content = content.get("outputs", content) if isinstance(content, dict) else content
        if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
            raise ValueError(f"{str(path)!r} is not an object of texts by id, such as {{'outputs': {{'4': '...'}}}}")
        return content
    answers: dict[str, str] = {}
    for number, row in json_lines(path):
        ids = [row[name] for name in _IDS if name in row] if isinstance(row, dict) else []
        texts = [row[name] for name in _TEXTS if isinstance(row.get(name), str)] if ids else []
        if not ids or not (texts or "error" in row):
            raise ValueError(
                f"line {number} of {str(path)!r} is {brief(row)}, not an answer; a line has question_id and text, or "
                "id and answer"
            )
        if str(ids[0]) in answers:
            raise ValueError(f"line {number} of {str(path)!r} repeats the question {ids[0]!r}; keep one")
        if texts:
            answers[str(ids[0])] = texts[0]
    return answers


def write_answers(path: Path, answers: Mapping[str, str]) -> None:
    """Answers by id as LLaVA's JSON Lines, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.writelines(to_json({"question_id": pid, "text": text}) + "\n" for pid, text in answers.items())


def text_baseline(
    data: Path, model: ChatModel, split: str = "test", prompt_format: str = TWO_SHOT_FORMAT, limit: int | None = None
) -> tuple[dict[str, str], dict[str, float]]:
    """
    Ask a text-only model every question of a split after two examples of the training split.

    Args:
        data: ScienceQA's release; images are not needed.
        model: The text-only model.
        split: Of `pid_splits.json`.
        prompt_format: Of examples and questions, one of `data.scienceqa.FORMATS`.
        limit: Maximum number of questions; the first ones are asked.

    Returns:
        Answers by id, and the accuracies of [`TABLE`] in %.

    Raises:
        ValueError: if the data is missing or wrong.
        JudgeStopped: as [`~evaluation.judging.ask_all`].
    """
    path = find_problems(data)
    examples = read_examples(path)
    problems = dict(list(read_split(path, split).items())[:limit])
    references = {pid: reference(problem, examples, prompt_format) for pid, problem in problems.items()}
    check_examples(references)
    answers = ask_text_model(references, model)
    records = [combine(references[pid], "", answers[pid]) | groups_of(problem) for pid, problem in problems.items()]
    return {pid: answers[pid] for pid in problems}, _accuracies(records, "text")


def ensemble(
    data: Path,
    own: Mapping[str, str],
    text: Mapping[str, str],
    output: Path,
    *,
    split: str = "test",
    judge: ChatModel | None = None,
    judged: Mapping[str, str] | None = None,
) -> JsonObject:
    """
    Combine two files of answers, and write `ensemble.json`, and the questions one by one in `ensemble.jsonl`.

    Args:
        data: ScienceQA's release; images are not needed.
        own: Answers of the model that saw the images, by id.
        text: Answers of the text-only model.
        output: Folder, created if it does not exist.
        split: Of `pid_splits.json`.
        judge: Is asked where the two differ; its answers go to `judge.jsonl`.
        judged: Answers of a judge that was asked before, in place of `judge`.

    Returns:
        What `ensemble.json` holds. `accuracy`: over all questions of the split, where one that a file lacks is wrong.
        `as_published`: over those that both files answer, as the authors' scripts count.

    Raises:
        ValueError: if the data is missing or wrong, or the files answer no question of it.
        JudgeStopped: as [`~evaluation.judging.ask_all`].
    """
    problems = read_split(find_problems(data), split)
    references = {pid: reference(problem, []) for pid, problem in problems.items()}
    both = [pid for pid in problems if pid in own and pid in text]
    if not both:
        raise ValueError(
            f"no question of the split {split!r} is answered in both files ({len(own)} and {len(text)} answers); "
            "check that they are of this split"
        )
    output.mkdir(parents=True, exist_ok=True)
    if judge is not None:
        judged = ask_judge({pid: references[pid] for pid in both}, own, text, judge)
        write_answers(output / JUDGED, judged)
    rows: list[Record] = [
        {"id": pid, **combine(references[pid], own[pid], text[pid], (judged or {}).get(pid))} for pid in both
    ]
    parts = PARTS if judged is not None else PARTS[:-1]
    results = _results(problems, rows, parts) | {"split": split}
    results["own_missing"] = sum(pid not in own for pid in problems)
    results["text_missing"] = sum(pid not in text for pid in problems)
    if judged is not None:
        results["judge_prompt"] = JUDGE_PROMPT if judge is not None else "unknown: the answers were given in a file"
        results["judge"] = {"model": judge.name, **asdict(judge.usage)} if judge is not None else "from a file"
        results["notes"] += [JUDGE_PROMPT_NOTE] if judge is not None else []
    with atomic_file(output / ROWS) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)
    write_json(output / RESULTS, results)
    return results


def _results(problems: Mapping[str, JsonObject], rows: list[Record], parts: tuple[str, ...]) -> JsonObject:
    answered = {row["id"]: row for row in rows}
    everything: list[Record] = [
        (answered[pid] if pid in answered else {f"{part}_correct": 0 for part in parts}) | groups_of(problem)
        for pid, problem in problems.items()
    ]
    count = Counter({name: sum(int(row[name] or 0) for row in rows) for name in rows[0] if name.endswith("answered")})
    return {
        "notes": [UNANSWERED_NOTE],
        "questions": len(problems),
        "accuracy": {part: _accuracies(everything, part) for part in parts},
        "as_published": {
            "questions": len(rows),
            **{part: 100 * sum(row[f"{part}_correct"] for row in rows) / len(rows) for part in parts},
            "upper_bound": 100 * sum(row["upper_bound_correct"] for row in rows) / len(rows),
        },
        "unanswered": {part: count[f"{part}_unanswered"] for part in parts},
        "text_no_answer": sum(row["text_no_answer"] for row in rows),
        "judge_asked": sum(row["judge_asked"] for row in rows),
        "judge_unreadable": sum(row["judge_unreadable"] or 0 for row in rows),
    }


def _accuracies(records: list[Record], part: str) -> dict[str, float]:
    columns = columns_of(records, {group[0] for group in TABLE.values() if group is not None})
    values = {name: float(mean(f"{part}_correct", 100, group)(columns)) for name, group in TABLE.items()}
    return {name: value for name, value in values.items() if value == value}  # without columns of no question
