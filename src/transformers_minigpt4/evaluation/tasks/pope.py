"""POPE: whether a model claims that absent objects are in an image, asked by yes-or-no questions."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from transformers_minigpt4.llm.client import ChatModel

from ..evaluator import Metric, Question, Record, Task, mean, of_sums, read_json_lines
from ..scorers.official_files import by_id, find_images, need_fields
from ..scorers.pope import is_clear, says_yes


# How the absent objects are drawn.
SAMPLINGS = ("random", "popular", "adversarial")


def precision(hits: np.ndarray, false_alarms: np.ndarray) -> np.ndarray:
    """Share of the yes answers that are right."""
    return hits / (hits + false_alarms)


def recall(hits: np.ndarray, misses: np.ndarray) -> np.ndarray:
    """Share of the objects that are found."""
    return hits / (hits + misses)


def f1(hits: np.ndarray, false_alarms: np.ndarray, misses: np.ndarray) -> np.ndarray:
    """Harmonic mean of precision and recall."""
    return 2 * hits / (2 * hits + false_alarms + misses)


def _metrics(sampling: str | None) -> Iterator[Metric]:
    where = None if sampling is None else ("sampling", sampling)
    suffix = "" if sampling is None else f"/{sampling}"
    share = partial(of_sums, scale=100, where=where, share=True)
    yield Metric(f"f1{suffix}", True, "%", share(f1, "hit", "false_alarm", "miss"))
    yield Metric(f"accuracy{suffix}", True, "%", mean("correct", scale=100, where=where))
    yield Metric(f"precision{suffix}", True, "%", share(precision, "hit", "false_alarm"))
    yield Metric(f"recall{suffix}", True, "%", share(recall, "hit", "miss"))
    yield Metric(f"yes{suffix}", None, "%", mean("yes", scale=100, where=where))
    yield Metric(f"unclear{suffix}", False, "%", mean("unclear", scale=100, where=where))


class POPE(Task):
    """
    Accuracy, precision, recall, F1 and share of yes, overall and by the way in which absent objects were drawn.

    Answers are read as in the official script, which takes every answer without "no" or "not" for a yes; `unclear` is
    the share of answers that contain neither, which reveals a model that does not answer the question.
    """

    name = "pope"
    paper = "POPE (Li et al., 2023)"
    description = "object hallucination by yes-or-no questions"
    data = (
        "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json, and COCO's val2014/ (or images/)"
    )
    dataset = "pope"
    split = "test"
    prompts = {"question": "{text}"}
    generation = {"max_new_tokens": 50}
    primary = "f1"
    metrics = tuple(metric for sampling in (None, *SAMPLINGS) for metric in _metrics(sampling))

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        """
        Read the three files, or one of them if `data` is a file. `limit` takes the same number from each.

        Raises:
            ValueError: if a file is missing or has another format, an id is repeated in one, or none of its images is
                there.
        """
        files = _files(data)
        share = None if limit is None else -(-limit // len(files))
        return [question for sampling, path in files.items() for question in _read(sampling, path)[:share]][:limit]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """`hit`, `false_alarm`, `miss`, `correct` and `yes` as 0 or 1; no answer is wrong, and a miss for a yes."""
        return [_score(question.reference["label"] == "yes", answers.get(question.id)) for question in questions]


def _files(data: Path) -> dict[str, Path]:
    if data.is_file():
        named = [sampling for sampling in SAMPLINGS if sampling in data.name]
        if len(named) != 1:
            raise ValueError(
                f"{str(data)!r} does not say which of POPE's samplings it is; its name must hold one of "
                f"{', '.join(SAMPLINGS)}"
            )
        return {named[0]: data}
    found = {sampling: sorted(data.glob(f"*pope*_{sampling}.json*")) for sampling in SAMPLINGS}
    for sampling, paths in found.items():
        if len(paths) != 1:
            raise ValueError(
                f"{str(data)!r} holds {len(paths)} files *pope*_{sampling}.json, but one is needed; give the "
                "official three files of one set, or one file"
            )
    return {sampling: paths[0] for sampling, paths in found.items()}


def _read(sampling: str, path: Path) -> list[Question]:
    rows = by_id(path, read_json_lines(path), "question_id")
    for key, row in rows.items():
        need_fields(path, key, row, {"image": str, "text": str, "label": str})
        if row["label"] not in ("yes", "no"):
            raise ValueError(f"the label of {key!r} in {str(path)!r} is {row['label']!r}, not yes or no")
    names = [row["image"] for row in rows.values()]
    images = find_images(path.parent, ("images", "val2014", "."), names, path)
    return [
        Question(
            f"{sampling}/{key}",
            row["text"],
            (images[row["image"]],),
            {"label": row["label"]},
            {"sampling": sampling},
        )
        for key, row in rows.items()
    ]


def _score(there: bool, answer: str | None) -> Record:
    if answer is None:
        return {"hit": 0, "false_alarm": 0, "miss": int(there), "correct": 0, "yes": None, "unclear": None}
    yes = says_yes(answer)
    return {
        "hit": int(yes and there),
        "false_alarm": int(yes and not there),
        "miss": int(there and not yes),
        "correct": int(yes == there),
        "yes": int(yes),
        "unclear": int(not is_clear(answer)),
    }
