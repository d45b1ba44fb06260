"""
LLaVA-Bench's published setting: the judge's messages, how its scores are read, and how they are summarized.

The texts are those of haotian-liu/LLaVA, commit c121f04 (`llava/eval/table/rule.json`, `eval_gpt_review_visual.py` and
`eval_gpt_review_bench.py`; Apache License 2.0), to the letter: published figures were measured with them.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from transformers_minigpt4.llm.types import Message
from transformers_minigpt4.utils.files import JsonObject
from transformers_minigpt4.utils.json_files import brief, json_lines


TEMPERATURE = 0.2
UNREADABLE = (-1.0, -1.0)  # what the authors' scripts take for the scores of a review that they cannot read
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
LAYOUT = (
    "[Context]\n{context}\n\n[Question]\n{question}\n\n[Assistant 1]\n{first}\n\n[End of Assistant 1]\n\n"
    "[Assistant 2]\n{second}\n\n[End of Assistant 2]\n\n[System]\n{rule}\n\n"
)
_REQUEST = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with {content}\n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives "
    "an overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the order in which the responses were presented does not affect your judgment."
)
# By kind of context: COCO's captions and boxes, or the texts of LLaVA-Bench (in the wild).
RULES: Mapping[str, str] = {
    "coco": _REQUEST.format(
        content="five descriptive sentences describing the same image and the bounding box coordinates of each object "
        "in the scene. These coordinates are in the form of bounding boxes, represented as (x1, y1, x2, y2) with "
        "floating numbers ranging from 0 to 1. These values correspond to the top left x, top left y, bottom right x, "
        "and bottom right y. "
    ),
    "in_the_wild": _REQUEST.format(content="a few sentences describing the image. "),
}


def review_messages(kind: str, context: str, question: str, first: str, second: str) -> list[Message]:
    """
    What the judge is sent about two answers.

    Args:
        kind: Of the context, a key of [`RULES`].
        context: As made by [`context_text`].
        question: What both were asked.
        first, second: The answers; in the published setting the reference is the first.
    """
    text = LAYOUT.format(context=context, question=question, first=first, second=second, rule=RULES[kind])
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def context_kind(row: JsonObject) -> str:
    """Which of [`RULES`] a row of context belongs to: COCO's have `captions`, those in the wild one `caption`."""
    return "coco" if "captions" in row else "in_the_wild"


def context_text(row: JsonObject) -> str:
    """
    The captions, a line each; for COCO then an empty line and the boxes, in shares of width and height.

    Raises:
        ValueError: for a row without captions, or with a box that lacks its category or place.
    """
    captions: str | list[object] = row.get("captions") or row.get("caption") or []
    text = captions if isinstance(captions, str) else "\n".join(map(str, captions))
    if not text:
        raise ValueError(f"the context {brief(row)} has no caption; take the file from the official release")
    if context_kind(row) != "coco":
        return text
    try:
        return f"{text}\n\n" + "\n".join(f"{box['category']}: {box['bbox']}" for box in row.get("instances", []))
    except (KeyError, TypeError) as error:
        raise ValueError(f"a box of the context {brief(row)} has no category or bbox; fetch the file again") from error


def read_scores(review: str) -> tuple[float, float] | None:
    """
    The two scores of a review as the authors' scripts read them; `None` for what they cannot read.

    The first line, with commas made spaces, must be exactly two numbers with one space between them: `"8,9"` is
    readable, `"8, 9"` and `" 8 9"` are not. Numbers outside 1 to 10 count.
    """
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        scores = [float(part) for part in parts]
    except ValueError:
        return None
    # Not a number is the one thing that their mean would not survive.
    return (scores[0], scores[1]) if len(scores) == 2 and all(map(math.isfinite, scores)) else None


def relative_score(model: np.ndarray, reference: np.ndarray, reviews: np.ndarray) -> np.ndarray:
    """Mean of the model's scores in % of the reference's, from sums and the number of reviews, rounded as there."""
    share: np.ndarray = np.round(np.round(model / reviews, 3) / np.round(reference / reviews, 3) * 100, 1)
    return share


def summarize_reviews(
    reviews: Iterable[tuple[str, tuple[float, float]]],
) -> dict[str, tuple[float, float, float]]:
    """
    What the authors' `summarize_gpt_review.py` prints.

    Args:
        reviews: Category and scores (reference, model), with [`UNREADABLE`] for unreadable ones.

    Returns:
        For `all` and each category in alphabetical order: relative score in %, mean of the reference × 10, mean of the
        model × 10.
    """
    scores: dict[str, list[tuple[float, float]]] = {}
    for category, pair in reviews:
        scores.setdefault(category, []).append(pair)
        scores.setdefault("all", []).append(pair)
    summary = {}
    for category, pairs in sorted(scores.items()):
        reference, model = np.array(pairs).sum(axis=0)
        count = np.array(len(pairs))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = float(relative_score(model, reference, count))
        first, second = (float(np.round(np.round(total / count, 3) * 10, 1)) for total in (reference, model))
        summary[category] = (ratio, first, second)
    return summary


def read_reviews(path: Path) -> list[JsonObject]:
    """
    A file of reviews of the authors' scripts: JSON Lines with `question_id`, `category` and `tuple`.

    Raises:
        ValueError: for a line of another format.
        OSError: if the file cannot be read.
    """
    rows = []
    for number, row in json_lines(path):
        pair = row.get("tuple", row.get("score")) if isinstance(row, dict) else None
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(x, int | float) for x in pair):
            raise ValueError(
                f"line {number} of {str(path)!r} is {brief(row)}, not a review; it needs category and tuple, the two "
                "scores"
            )
        rows.append({"question_id": row.get("question_id"), "category": row.get("category"), "tuple": pair})
    if not rows:
        raise ValueError(f"{str(path)!r} holds no review")
    return rows
