"""GQA (Table 4 of the MiniGPT-4 paper): questions about scenes with one short answer each."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.utils.files import JsonObject

from ..evaluator import Metric, Question, Record, Task, find_file, mean
from ..scorers.official_files import find_images, need_fields, read_object
from ..scorers.vqa_text import normalize_answer


# Ours: the authors' prompt for this task was never published.
PROMPT = "{question}\nAnswer the question with a single word or a short phrase."

# The official kinds of questions; "open" and "binary" are the structural kind "query" and all others.
STRUCTURAL = ("verify", "query", "choose", "logical", "compare")
SEMANTIC = ("obj", "attr", "rel", "cat", "global")


class GQA(Task):
    """
    Accuracy over the balanced questions.

    The official script requires the exact answer. `accuracy` compares after VQA's normalization of both sides;
    `accuracy/as_given` is the official script on the text that LLaVA's evaluation passes to it: lower case, no full
    stop at the end.
    """

    name = "gqa"
    paper = "MiniGPT-4, Table 4"
    description = "questions about scenes, exact match"
    data = "testdev_balanced_questions.json, and images/ with GQA's images"
    dataset = "gqa"
    split = "testdev"
    prompts = {"question": PROMPT}
    generation = {"max_new_tokens": 20}
    primary = "accuracy"
    metrics = (
        Metric("accuracy", True, "%", mean("correct", scale=100)),
        Metric("accuracy/as_given", True, "%", mean("correct_as_given", scale=100)),
        Metric("accuracy/open", True, "%", mean("correct", scale=100, where=("form", "open"))),
        Metric("accuracy/binary", True, "%", mean("correct", scale=100, where=("form", "binary"))),
        *(
            Metric(f"accuracy/{group}/{kind}", True, "%", mean("correct", scale=100, where=(group, kind)))
            for group, kinds in (("structural", STRUCTURAL), ("semantic", SEMANTIC))
            for kind in kinds
        ),
    )

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        """
        Read `testdev_balanced_questions.json`, or another file in this format; only balanced questions.

        Raises:
            ValueError: if the file is missing or has another format, an id is repeated, or none of its images is
                there.
        """
        path = find_file(data, "testdev_balanced_questions.json", "*_balanced_questions.json", "*_questions.json")
        rows = read_object(path)
        for key, row in rows.items():
            need_fields(path, key, row, {"question": str, "imageId": str, "answer": str, "types": dict})
            need_fields(path, key, row["types"], {"structural": str, "semantic": str})
        rows = {key: row for key, row in rows.items() if row.get("isBalanced", True)}
        names = {key: f"{row['imageId']}.jpg" for key, row in rows.items()}
        images = find_images(path.parent, ("images", "../images", "."), names.values(), path)
        return [_question(key, row, images[names[key]]) for key, row in rows.items()][:limit]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """`correct` and `correct_as_given` as 0 or 1; 0 without an answer."""
        records: list[Record] = []
        for question in questions:
            answer = answers.get(question.id)
            if answer is None:
                records.append({"correct": 0, "correct_as_given": 0})
                continue
            gold, normalized = question.reference["answer"], normalize_answer(answer)
            records.append(
                {
                    "correct": int(normalized == normalize_answer(gold)),
                    "correct_as_given": int(as_given(answer) == gold),
                    "normalized": normalized,
                }
            )
        return records


def as_given(answer: str) -> str:
    """An answer as LLaVA's evaluation passes it to the official script."""
    return answer.rstrip(".").lower()


def _question(key: str, row: JsonObject, image: str) -> Question:
    kinds = row["types"]
    groups = {
        "structural": kinds["structural"],
        "semantic": kinds["semantic"],
        "form": "open" if kinds["structural"] == "query" else "binary",
    }
    prompt = PROMPT.format(question=row["question"])
    return Question(key, prompt, (image,), {"answer": row["answer"]}, groups)
