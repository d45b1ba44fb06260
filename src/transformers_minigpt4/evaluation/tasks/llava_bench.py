"""LLaVA's chat score: answers scored by a judge relative to a reference answer, by kind of question."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.llm.types import Message
from transformers_minigpt4.utils.files import JsonObject

from ..evaluator import Metric, Question, Record, Statistic, Task, find_file, mean, of_sums, ratio, read_json_lines
from ..judging import Verdict, judge_in_both_orders, need_judge
from ..llava_reviews import (
    LAYOUT,
    RULES,
    SYSTEM,
    TEMPERATURE,
    UNREADABLE,
    context_kind,
    context_text,
    read_scores,
    relative_score,
    review_messages,
)


KINDS = {"conv": "conversation", "detail": "detailed description", "complex": "complex reasoning"}
LOWEST, HIGHEST = 1.0, 10.0  # the judge's scale, LLaVA's own
NOTES = (
    "published/...: the authors' setting; the reference is always first, and a review that cannot be read scores -1 "
    "for both, as published/unreadable counts",
    "all others: our stricter setting; each pair is judged in both orders, and one that cannot be read counts neither "
    "for nor against",
)


def _published(where: tuple[str, str] | None = None) -> Statistic:
    columns = ("published_score", "published_reference_score", "published")
    return of_sums(relative_score, *columns, where=where)


def _strict(where: tuple[str, str] | None = None) -> Statistic:
    return ratio("score", "reference_score", scale=100, where=where)


def _metrics() -> tuple[Metric, ...]:
    kinds = {kind: ("kind", kind) for kind in KINDS}
    return (
        Metric("relative_score", True, "%", _strict()),
        *(Metric(f"relative_score/{kind}", True, "%", _strict(where)) for kind, where in kinds.items()),
        Metric("score", True, "points", mean("score")),
        Metric("reference_score", None, "points", mean("reference_score")),
        Metric("unreadable", None, "%", mean("unreadable", scale=100)),
        Metric("published/relative_score", True, "%", _published()),
        *(Metric(f"published/relative_score/{kind}", True, "%", _published(where)) for kind, where in kinds.items()),
        Metric("published/score", True, "points", mean("published_score")),
        Metric("published/reference_score", None, "points", mean("published_reference_score")),
        Metric("published/unreadable", None, "%", mean("published_unreadable", scale=100)),
        Metric("no_review", None, "%", mean("no_review", scale=100)),
    )


class LLaVABench(Task):
    """
    The score of LLaVA-Bench (COCO: 30 images × 3 questions; in the wild: 24 images, 60 questions).

    The judge sees captions and, for COCO, boxes instead of the image, the question, and the two answers: the model's
    and the reference, by GPT-4 in the official files. It scores each from 1 to 10. The result is the mean of the
    model's scores as a percentage of the mean of the reference's.

    Each pair is judged in both orders, with the authors' messages and temperature. `published/relative_score` is their
    script's result: of the order with the reference first, with -1 for both where the scores cannot be read.
    `relative_score` is the mean of both orders, in which a review that cannot be read counts neither for nor against.
    A pair that the endpoint refuses to review has no score in either.
    """

    name = "llava_bench"
    paper = "LLaVA, chat score relative to GPT-4"
    description = "score relative to a reference answer, by conversation, detail and complex reasoning"
    data = (
        "qa90_questions.jsonl, qa90_gpt4_answer.jsonl, caps_boxes_coco2014_val_80.jsonl; in the wild: "
        "questions.jsonl, answers_gpt4.jsonl, context.jsonl; both: images/"
    )
    dataset = "LLaVA-Bench"
    prompts = {"question": "{text}"}
    judge_prompts = {"system": SYSTEM, "layout": LAYOUT, **{f"rule/{kind}": rule for kind, rule in RULES.items()}}
    judge_temperature = TEMPERATURE
    notes = NOTES
    generation = {"max_new_tokens": 1024}
    primary = "relative_score"
    metrics = _metrics()
    needs_judge = True

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        """
        Read questions, reference answers and contexts in the formats of LLaVA's repository and of its in-the-wild set.

        Raises:
            ValueError: if a file is missing or a question has no reference answer, no context or an unknown kind.
        """
        source = find_file(data, "qa90_questions.jsonl", "questions.jsonl", "*questions*.jsonl")
        folder = source.parent
        references = _by(find_file(folder, "qa90_gpt4_answer.jsonl", "answers_gpt4.jsonl"), "question_id", "text")
        contexts = _by(find_file(folder, "caps_boxes_coco2014_val_80.jsonl", "context.jsonl"), "image")
        questions = []
        for key, row in _by(source, "question_id", "text", "image", "category").items():
            for what, found in (("reference answer", key in references), ("context", row["image"] in contexts)):
                if not found:
                    raise ValueError(
                        f"question {key} of {str(source)!r} has no {what}; take the three files from the same release"
                    )
            if row["category"] not in KINDS:
                raise ValueError(
                    f"question {key} of {str(source)!r} is of kind {row['category']!r}, not {', '.join(KINDS)}"
                )
            context = contexts[row["image"]]
            reference = {
                "answer": references[key]["text"],
                "context": context_text(context),
                "kind_of_context": context_kind(context),
            }
            image = _image(folder / "images", row["image"])
            questions.append(Question(key, row["text"], (str(image),), reference, {"kind": row["category"]}))
        return questions[:limit]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """
        `score` and `reference_score` from 1 to 10, without a value if the judge was unreadable; `published_score` and
        `published_reference_score`, which are -1 then.

        A question without an answer gets the ends of the scale, 1 against 10.

        Raises:
            ValueError: without a judge.
            JudgeStopped: as [`judging.judge_all`].
        """
        judge = need_judge(judge, self.name)
        pairs = [
            (question.id, _writer(question), question.reference["answer"], answers[question.id])
            for question in questions
            if question.id in answers
        ]
        verdicts = judge_in_both_orders(judge, pairs)
        return [_record(verdicts.get(question.id)) for question in questions]


def _record(verdict: Verdict[tuple[float, float]] | None) -> Record:
    if verdict is None:  # the question has no answer
        scores = {"score": LOWEST, "reference_score": HIGHEST}
        published = {f"published_{name}": value for name, value in scores.items()}
        return scores | published | {"published": 1, "unreadable": None, "published_unreadable": None}
    record: Record = {"judge": verdict.text, "no_review": int(verdict.first.failure is not None)}
    record["reference_score"], record["score"] = verdict.value or (None, None)
    record["unreadable"] = int(verdict.value is None)
    if verdict.first.failure is None:  # a failure of the endpoint is not a review
        pair = read_scores(verdict.first.received)
        record["published_reference_score"], record["published_score"] = pair or UNREADABLE
        record |= {"published": 1, "published_unreadable": int(pair is None)}
    return record


def _writer(question: Question) -> Callable[[str, str], list[Message]]:
    facts = question.reference
    return partial(review_messages, facts["kind_of_context"], facts["context"], question.prompt)


def _by(path: Path, key: str, *fields: str) -> dict[str, JsonObject]:
    """Rows of a JSON Lines file by one of their fields, as text, in the file's order."""
    rows: dict[str, JsonObject] = {}
    for number, row in enumerate(read_json_lines(path), start=1):
        missing = [name for name in (key, *fields) if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(
                f"line {number} of {str(path)!r} has no {', '.join(map(repr, missing))}; is it the right file?"
            )
        if str(row[key]) in rows:
            raise ValueError(f"line {number} of {str(path)!r} repeats the {key} {row[key]!r}; keep one")
        rows[str(row[key])] = row
    return rows


def _image(folder: Path, name: str) -> Path:
    """The file of an image, which COCO's own archives name with a prefix."""
    prefixed = folder / f"COCO_val2014_{name}"
    return prefixed if prefixed.exists() else folder / name
