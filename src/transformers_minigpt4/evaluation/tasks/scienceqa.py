"""ScienceQA: school questions with text or image as context, also in ensembles with a text-only language model."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.utils.files import JsonObject

from ..evaluator import Metric, Question, Record, Task, find_file, mean
from ..judging import ResponseFormat, Verdict, judge_all
from ..scorers.choices import LETTERS, parse_choice, parse_choice_as_llava
from ..scorers.official_files import check_choices, find_images, need_fields, read_object
from .aokvqa import options_text


# The format CQM-A of ScienceQA's and LLaVA's authors: context, question, multiple options; an answer. The last line is
# LLaVA's, for models that were not trained on this format.
PROMPT = (
    "Context: {context}\nQuestion: {question}\nOptions: {options}\n"
    "Answer with the option's letter from the given choices directly."
)
# Ours, both.
TEXT_PROMPT = (
    "Context: {context}\nQuestion: {question}\nOptions: {options}\n\n"
    "Some of these questions come with a picture, which you cannot see. Think in at most five sentences. Then end "
    'with the sentence "The answer is X.", where X is the letter of one option. If the question cannot be answered '
    'without the picture, end with "No answer." instead.'
)
JUDGE_PROMPT = (
    "Context: {context}\nQuestion: {question}\nOptions: {options}\n\n"
    "Two assistants gave different answers. Some of these questions come with a picture; one of the two saw it.\n\n"
    "[First answer]\n{first}\n[End of first answer]\n\n[Second answer]\n{second}\n[End of second answer]\n\n"
    "Give your own final answer, based on the question and these two. End with the sentence "
    '"The answer is X.", where X is the letter of one option.'
)
NO_ANSWER = ""

SUBJECTS = {"natural": "natural science", "social": "social science", "language": "language science"}
CONTEXTS = ("text", "image", "none")
GRADES = {"1-6": range(1, 7), "7-12": range(7, 13)}

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "question": str,
    "choices": list,
    "answer": int,
    "hint": str,
    "image": (str, type(None)),
    "subject": str,
    "grade": str,
}
_ANSWER_IS = re.compile(r"[Tt]he answer is \(?([A-Z])\b")
_DECLINED = re.compile(r"no answer\W*$", re.IGNORECASE)


def _final_letter(text: str) -> str | None:
    said = set(_ANSWER_IS.findall(text))
    return said.pop() if len(said) == 1 else None


def _letter_or_none(text: str) -> str | None:
    return _final_letter(text) or (NO_ANSWER if _DECLINED.search(text.strip()) else None)


_TEXT_FORMAT: ResponseFormat[str] = ResponseFormat(
    _letter_or_none,
    'That answer cannot be used. End with the sentence "The answer is X.", where X is the letter of one option, or '
    'with "No answer."',
)
_JUDGE_FORMAT: ResponseFormat[str] = ResponseFormat(
    _final_letter,
    'That answer cannot be used. Write the sentence "The answer is X.", where X is the letter of one option, and '
    "nothing else.",
)


def _metrics() -> tuple[Metric, ...]:
    by_group = [
        *((f"subject/{name}", ("subject", value)) for name, value in SUBJECTS.items()),
        *((f"context/{name}", (f"context_{name}", "yes")) for name in CONTEXTS),
        *((f"grade/{name.replace('-', '_')}", ("grades", name)) for name in GRADES),
    ]
    return (
        Metric("accuracy", True, "%", mean("correct", scale=100)),
        *(Metric(f"accuracy/{name}", True, "%", mean("correct", scale=100, where=where)) for name, where in by_group),
        Metric("accuracy/llava_script", True, "%", mean("correct_as_llava", scale=100)),
        Metric("unparsed", False, "%", mean("unparsed", scale=100)),
        Metric("text_model", True, "%", mean("text_correct", scale=100)),
        Metric("text_model/no_answer", None, "%", mean("text_no_answer", scale=100)),
        Metric("text_model/unreadable", None, "%", mean("text_unreadable", scale=100)),
        Metric("ensemble/complement", True, "%", mean("complement_correct", scale=100)),
        Metric("ensemble/judge", True, "%", mean("judge_correct", scale=100)),
        Metric("ensemble/asked", None, "%", mean("judge_asked", scale=100)),
        Metric("ensemble/unreadable", None, "%", mean("judge_unreadable", scale=100)),
    )


class ScienceQA(Task):
    """
    Accuracy overall, by subject, context and grade; with a judge also the two ensembles of the LLaVA paper.

    The judge is a text-only language model, which first answers every question by itself. `ensemble/complement` takes
    its answer, or the model's if it gives none. `ensemble/judge` asks it again if the two differ, showing both answers
    (in an order drawn from the question's id), for one final answer.
    """

    name = "scienceqa"
    paper = "LLaVA, ScienceQA"
    description = "school questions with context, by subject, context and grade; ensembles with a text-only model"
    data = "problems.json, pid_splits.json, and test/ (or images/test/) with PID/image.png"
    dataset = "scienceqa"
    split = "test"
    prompts = {"question": PROMPT}
    judge_prompts = {"text_model": TEXT_PROMPT, "ensemble": JUDGE_PROMPT}
    generation = {"max_new_tokens": 50}
    primary = "accuracy"
    metrics = _metrics()

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        """
        Read the test split in the order of `pid_splits.json`.

        Raises:
            ValueError: if a file is missing or has another format, an id is repeated or is not among the problems, or
                none of the images is there.
        """
        path = find_file(data, "problems.json", "data/scienceqa/problems.json")
        problems, splits = read_object(path), read_object(path.parent / "pid_splits.json")
        chosen = splits.get(self.split)
        if not isinstance(chosen, list):
            raise ValueError(f"{str(path.parent / 'pid_splits.json')!r} has no split {self.split!r}; fetch it again")
        lost = [pid for pid in chosen if pid not in problems]
        if lost:
            raise ValueError(
                f"{len(lost)} of the {len(chosen)} ids of the split {self.split!r} are not in {str(path)!r}, such as "
                f"{lost[0]!r}; take both files from the same release"
            )
        for pid in chosen:
            need_fields(path, pid, problems[pid], _FIELDS)
            check_choices(path, pid, problems[pid]["choices"], problems[pid]["answer"])
        names = {pid: f"{pid}/{problems[pid]['image']}" for pid in chosen if problems[pid]["image"]}
        folders = (f"images/{self.split}", self.split, "images")
        images = find_images(path.parent, folders, names.values(), path)
        return [_question(pid, problems[pid], images.get(names.get(pid, ""))) for pid in chosen][:limit]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """
        `correct`, `correct_as_llava` and `unparsed`; with a judge also the ensembles' columns. All 0 for no answer.

        Raises:
            JudgeStopped: as [`judging.judge_all`].
        """
        records = [_score(question.reference, answers.get(question.id)) for question in questions]
        if judge is not None:
            _add_ensembles(questions, answers, records, judge)
        return records


def _question(pid: str, problem: JsonObject, image: str | None) -> Question:
    fields = {
        # The authors' script removes double spaces.
        "context": problem["hint"].strip().replace("  ", " ") or "N/A",
        "question": problem["question"].strip().replace("  ", " "),
        "options": options_text(problem["choices"]).replace("  ", " "),
    }
    grade = problem["grade"].removeprefix("grade")
    groups = {
        "subject": problem["subject"],
        "grades": next((name for name, span in GRADES.items() if grade.isdigit() and int(grade) in span), "other"),
        "context_text": "yes" if problem["hint"] else "no",
        "context_image": "yes" if problem["image"] else "no",
        "context_none": "no" if problem["hint"] or problem["image"] else "yes",
    }
    reference = {"choices": problem["choices"], "correct": problem["answer"], "fields": fields}
    return Question(pid, PROMPT.format(**fields), (image,) if image else (), reference, groups)


def _score(reference: JsonObject, answer: str | None) -> Record:
    if answer is None:
        return {"correct": 0, "correct_as_llava": 0, "unparsed": None, "chosen": None}
    chosen = parse_choice(answer, reference["choices"])
    return {
        "correct": int(chosen == reference["correct"]),
        "correct_as_llava": int(parse_choice_as_llava(answer, reference["choices"]) == reference["correct"]),
        "unparsed": int(chosen is None),
        "chosen": chosen,
    }


def _add_ensembles(
    questions: Sequence[Question], answers: Mapping[str, str], records: Sequence[Record], judge: ChatModel
) -> None:
    rows = [(q, answers[q.id], record) for q, record in zip(questions, records) if q.id in answers]
    prompts = [(question.id, TEXT_PROMPT.format(**question.reference["fields"])) for question, _, _ in rows]
    texts = judge_all(judge, prompts, _TEXT_FORMAT, "text model")
    alone = {question.id: _number(texts[question.id], question.reference) for question, _, _ in rows}
    differ = [
        (question.id, _judge_prompt(question, answer, texts[question.id].text))
        for question, answer, record in rows
        if None not in (record["chosen"], alone[question.id]) and record["chosen"] != alone[question.id]
    ]
    verdicts = judge_all(judge, differ, _JUDGE_FORMAT, "judge")
    for record in records:
        record |= {"text_correct": 0, "complement_correct": 0, "judge_correct": 0, "judge_asked": 0}
    for question, _, record in rows:
        correct, text, own = question.reference["correct"], alone[question.id], record["chosen"]
        complement = own if text is None else text
        final, verdict = complement, verdicts.get(question.id)
        if verdict is not None:
            # If the judge is unreadable, the answer of the model that saw the image counts, as in LLaVA's script.
            final = _number(verdict, question.reference)
            record |= {"judge_asked": 1, "judge_unreadable": int(final is None), "judge": verdict.text}
            final = own if final is None else final
        record |= {
            "text_correct": int(text == correct),
            "text_no_answer": int(texts[question.id].value == NO_ANSWER),
            "text_unreadable": int(text is None and texts[question.id].value != NO_ANSWER),
            "text_model": texts[question.id].text,
            "complement_correct": int(complement == correct),
            "judge_correct": int(final == correct),
        }


def _number(verdict: Verdict[str], reference: JsonObject) -> int | None:
    """The number of the option that a judge named; `None` if it named none of them."""
    if not verdict.value:
        return None
    number = LETTERS.index(verdict.value)
    return number if number < len(reference["choices"]) else None


def _judge_prompt(question: Question, own: str, text: str) -> str:
    first, second = own, text
    # Half of the questions in each order, so that a judge biased toward a position favors neither.
    if hashlib.sha256(question.id.encode()).digest()[0] % 2:
        first, second = second, first
    return JUDGE_PROMPT.format(**question.reference["fields"], first=first, second=second)
