"""A-OKVQA (Table 4 of the MiniGPT-4 paper): questions that need knowledge, by multiple choice and answered freely."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.utils.files import JsonObject

from ..evaluator import Metric, Question, Record, Task, find_file, mean, read_json
from ..scorers.choices import LETTERS, parse_choice
from ..scorers.official_files import by_id, check_choices, find_images, need_fields
from ..scorers.vqa_text import direct_answer_score, normalize_answer


# Ours: the authors' prompts for this task were never published.
MULTIPLE_CHOICE = (
    "Question: {question}\nOptions: {options}\nAnswer with the option's letter from the given choices directly."
)
DIRECT_ANSWER = "Question: {question}\nAnswer the question with a single word or a short phrase."

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "image_id": int,
    "question": str,
    "choices": list,
    "correct_choice_idx": int,
    "direct_answers": list,
    "difficult_direct_answer": bool,
}


def options_text(choices: Sequence[str]) -> str:
    """Options in one line, as ScienceQA's authors write them: `(A) red (B) green`."""
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))


class AOKVQA(Task):
    """
    Each question is asked twice: with its four options, and freely (except those marked as too hard for that).

    A direct answer scores a third for each of the ten references that it equals, at most 1, as in the official
    script. `direct_answer` compares after VQA's normalization of both sides, `direct_answer/as_given` letter by
    letter, as that script does.
    """

    name = "aokvqa"
    paper = "MiniGPT-4, Table 4"
    description = "questions about images that need knowledge, by multiple choice and as direct answers"
    data = "aokvqa_v1p0_val.json, and COCO's val2017/ (or images/)"
    dataset = "a-okvqa"
    split = "validation"
    prompts = {"multiple_choice": MULTIPLE_CHOICE, "direct_answer": DIRECT_ANSWER}
    generation = {"max_new_tokens": 50}
    primary = "multiple_choice"
    metrics = (
        Metric("multiple_choice", True, "%", mean("choice_correct", scale=100)),
        Metric("unparsed", False, "%", mean("unparsed", scale=100)),
        Metric("direct_answer", True, "%", mean("direct_score", scale=100)),
        Metric("direct_answer/as_given", True, "%", mean("direct_score_as_given", scale=100)),
    )

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        """
        Read `aokvqa_v1p0_*.json` of a split with answers.

        Raises:
            ValueError: if the file is missing or has another format, an id is repeated, the split has no answers, or
                none of its images is there.
        """
        path = find_file(data, "aokvqa_v1p0_val.json", "aokvqa_v1p0_*.json")
        rows = by_id(path, read_json(path), "question_id")
        for key, row in rows.items():
            need_fields(path, key, row, _FIELDS)
            check_choices(path, key, row["choices"], row["correct_choice_idx"])
        names = {key: f"{row['image_id']:012}.jpg" for key, row in rows.items()}
        split = path.stem.rpartition("_")[2]
        images = find_images(path.parent, ("images", f"{split}2017", "val2017", "."), names.values(), path)
        asked = (ask for key, row in rows.items() for ask in _ask(key, row, images[names[key]]))
        return list(asked)[:limit]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """`choice_correct` and `unparsed` of multiple choice, `direct_score` of direct answers; 0 if there is none."""
        return [
            (_score_choice if question.groups["setting"] == "multiple_choice" else _score_direct)(
                question.reference, answers.get(question.id)
            )
            for question in questions
        ]


def _ask(key: str, row: JsonObject, image: str) -> Iterator[Question]:
    choices = row["choices"]
    prompt = MULTIPLE_CHOICE.format(question=row["question"], options=options_text(choices))
    reference: JsonObject = {"choices": choices, "correct": row["correct_choice_idx"]}
    yield Question(f"{key}/multiple_choice", prompt, (image,), reference, {"setting": "multiple_choice"})
    if not row["difficult_direct_answer"]:
        prompt = DIRECT_ANSWER.format(question=row["question"])
        reference = {"answers": row["direct_answers"]}
        yield Question(f"{key}/direct_answer", prompt, (image,), reference, {"setting": "direct_answer"})


def _score_choice(reference: JsonObject, answer: str | None) -> Record:
    if answer is None:
        return {"choice_correct": 0, "unparsed": None}
    chosen = parse_choice(answer, reference["choices"])
    return {"choice_correct": int(chosen == reference["correct"]), "unparsed": int(chosen is None), "chosen": chosen}


def _score_direct(reference: JsonObject, answer: str | None) -> Record:
    if answer is None:
        return {"direct_score": 0, "direct_score_as_given": 0}
    normalized = [normalize_answer(text) for text in reference["answers"]]
    return {
        "direct_score": direct_answer_score(normalize_answer(answer), normalized),
        "direct_score_as_given": direct_answer_score(answer, reference["answers"]),
        "normalized": normalize_answer(answer),
    }
