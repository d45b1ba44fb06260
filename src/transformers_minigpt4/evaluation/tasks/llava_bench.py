"""LLaVA's chat score: answers scored by a judge relative to a reference answer, by kind of question."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.utils.files import JsonObject

from ..evaluator import Metric, Question, Record, Task, find_file, mean, ratio, read_json_lines
from ..judging import judge_in_both_orders, need_judge


KINDS = {"conv": "conversation", "detail": "detailed description", "complex": "complex reasoning"}
LOWEST, HIGHEST = 1.0, 10.0  # the judge's scale, LLaVA's own

_JUDGE = (
    "Two assistants answered a question about a picture. You cannot see the picture; this is what it shows:\n{context}"
    "\n\nQuestion: {question}\n\nAnswer of assistant 1:\n{first}\n\nAnswer of assistant 2:\n{second}\n\n"
    "Rate how helpful, relevant, accurate and detailed each answer is, with one overall score from 1 to 10 for each; "
    "higher is better. Their order says nothing about them. Write the two scores, the one of assistant 1 first, on "
    "the first line, with a space between them and nothing else on that line. Then explain them."
)


class LLaVABench(Task):
    """
    The score of LLaVA-Bench (COCO: 30 images × 3 questions; in the wild: 24 images, 60 questions).

    The judge sees captions and, for COCO, boxes instead of the image, the question, and the two answers: the model's
    and the reference, by GPT-4 in the official files. It scores each from 1 to 10. The result is the mean of the
    model's scores as a percentage of the mean of the reference's. Unlike LLaVA's script, which always puts the
    reference first, each pair is judged in both orders and averaged.
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
    judge_prompts = {"score": _JUDGE}
    generation = {"max_new_tokens": 1024}
    primary = "relative_score"
    metrics = (
        Metric("relative_score", True, "%", ratio("score", "reference_score", scale=100)),
        *(
            Metric(
                f"relative_score/{kind}", True, "%", ratio("score", "reference_score", scale=100, where=("kind", kind))
            )
            for kind in KINDS
        ),
        Metric("score", True, "points", mean("score")),
        Metric("reference_score", None, "points", mean("reference_score")),
        Metric("unreadable", None, "%", mean("unreadable", scale=100)),
    )
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
            reference = {"answer": references[key]["text"], "context": _context(contexts[row["image"]])}
            image = _image(folder / "images", row["image"])
            questions.append(Question(key, row["text"], (str(image),), reference, {"kind": row["category"]}))
        return questions[:limit]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """
        `score` and `reference_score` from 1 to 10, without a value if the judge was unreadable.

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
        records: list[Record] = []
        for question in questions:
            verdict = verdicts.get(question.id)
            if verdict is None:
                records.append({"score": LOWEST, "reference_score": HIGHEST, "unreadable": None})
                continue
            reference_score, score = verdict.value or (None, None)
            records.append(
                {
                    "score": score,
                    "reference_score": reference_score,
                    "unreadable": int(verdict.value is None),
                    "judge": verdict.text,
                }
            )
        return records


def _writer(question: Question) -> Callable[[str, str], str]:
    return partial(_write, question.reference["context"], question.prompt)


def _write(context: str, question: str, first: str, second: str) -> str:
    return _JUDGE.format(context=context, question=question, first=first, second=second)


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


def _context(row: JsonObject) -> str:
    """The lines that describe the image: captions, then `category: [x, y, x, y]` in shares of width and height."""
    captions = row.get("captions") or row.get("caption") or []
    lines: list[str] = [captions] if isinstance(captions, str) else list(captions)
    boxes = [f"{instance['category']}: {instance['bbox']}" for instance in row.get("instances", [])]
    return "\n".join([*lines, "", *boxes] if boxes else lines)


def _image(folder: Path, name: str) -> Path:
    """The file of an image, which COCO's own archives name with a prefix."""
    prefixed = folder / f"COCO_val2014_{name}"
    return prefixed if prefixed.exists() else folder / name
