"""Table 1 of the MiniGPT-4 paper: memes, recipes, advertisements and poems, judged by people or a language model."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from transformers_minigpt4.inference.sources import IMAGE_SUFFIXES
from transformers_minigpt4.llm.client import ChatModel

from ..evaluator import Metric, Question, Record, Task, mean, of_sums, read_json_lines
from ..judging import YES_NO, judge_all


DESCRIPTIONS = "descriptions.jsonl"

PROMPTS = {
    "meme": "Explain why this meme is funny.",
    "recipe": "How should I make something like this?",
    "advertisement": "Help me draft a professional advertisement for this.",
    "poem": "Can you craft a beautiful poem about this image?",
}

_JUDGE = (
    "Someone showed a picture to an assistant and wrote: {prompt}\n\n"
    "What the picture shows, written by a person who saw it:\n{description}\n\n"
    "What the assistant answered:\n{answer}\n\n"
    "Does the answer satisfy the request? {criterion} It must fit this picture; an answer that would fit any picture, "
    "tells of things that are not there, breaks off or repeats itself does not satisfy it. Answer with the one word "
    "yes or no."
)
CRITERIA = {
    "meme": "It must say what makes the picture funny; to describe what can be seen is not enough.",
    "recipe": "It must name what is needed and the steps to make what is shown, in an order that works.",
    "advertisement": "It must be the text of an advertisement for what is shown, fit for use after light editing.",
    "poem": "It must be a poem, in verses, about what is shown.",
}


def _count(counted: np.ndarray, images: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """
    A count over a request's images; each question records their number, so `images / asked` is that number.

    A bootstrap sample holds more or fewer questions of a request than there are. Scaled to their real number, the
    interval of a count over 25 images does not exceed 25.
    """
    return counted * (images / asked) / asked


def _successes(succeeded: np.ndarray, judged: np.ndarray, images: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The same, without a value where nothing was judged, because 0 successes would be a verdict."""
    return np.where(judged == 0, np.nan, _count(succeeded, images, asked))


def _most(succeeded: float, judged: float, images: float, asked: float) -> float:
    """The largest number of successes."""
    return images / asked


def _metrics(task: str) -> Iterator[Metric]:
    where = ("task", task)
    successes = of_sums(_successes, "succeeded", "judged", "images", "asked", where=where, share=_most)
    yield Metric(f"successes/{task}", True, "images", successes)
    yield Metric(f"judged/{task}", None, "images", of_sums(_count, "judged", "images", "asked", where=where))


def verdict_columns(success: bool | None) -> Record:
    """The columns of a verdict in a record; `None` if there is no verdict."""
    return {
        "success": None if success is None else int(success),
        "succeeded": int(success is True),
        "judged": int(success is not None),
    }


class Advanced(Task):
    """
    4 tasks × 25 images; an answer is a success if it satisfies the request.

    The authors' images were never published, so you provide the folders `meme/`, `recipe/`, `advertisement/` and
    `poem/` with images. For a language model as judge, each also holds `descriptions.jsonl` with lines
    `{"image": "01.jpg", "description": "what a person sees there, and for a meme what the joke is"}`, which the judge
    sees instead of the image. Without a judge the answers are left for people to judge (`evaluation/human_page.py`).
    """

    name = "advanced"
    paper = "MiniGPT-4, Table 1"
    description = "requests for meme explanations, recipes, advertisements and poems that are satisfied"
    data = "meme/, recipe/, advertisement/, poem/: images, and descriptions.jsonl for a language model as judge"
    dataset = "advanced abilities"
    prompts = PROMPTS
    judge_prompts = {task: _JUDGE.replace("{criterion}", criterion) for task, criterion in CRITERIA.items()}
    generation = {"max_new_tokens": 300}
    primary = "success"
    metrics = (
        Metric("success", True, "%", mean("success", scale=100)),
        *(metric for task in PROMPTS for metric in _metrics(task)),
        Metric("unreadable", None, "%", mean("unreadable", scale=100)),
    )

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        """
        The images of the four folders, task by task.

        Raises:
            ValueError: if a folder is missing or empty, or a description has no image.
        """
        questions = [
            Question(f"{task}/{image.name}", prompt, (str(image),), {"description": description}, {"task": task})
            for task, prompt in PROMPTS.items()
            for image, description in _images(data / task)
        ]
        return questions[:limit]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """
        `success` as 0 or 1, or `None` if nobody judged or the judge was unreadable.

        Raises:
            ValueError: if there is a judge and an image without description.
            JudgeStopped: as [`judging.judge_all`].
        """
        verdicts = judge_all(judge, self._judge_questions(questions, answers), YES_NO) if judge else {}
        images = Counter(question.groups["task"] for question in questions)
        records: list[Record] = []
        for question in questions:
            record: Record = {"images": images[question.groups["task"]], "asked": 1, "unreadable": None}
            if question.id not in answers:
                record |= verdict_columns(False)
            elif question.id in verdicts:
                verdict = verdicts[question.id]
                record |= verdict_columns(verdict.value)
                record |= {"unreadable": int(verdict.value is None), "judge": verdict.text}
            else:
                record |= verdict_columns(None)
            records.append(record)
        return records

    def _judge_questions(self, questions: Sequence[Question], answers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        for question in questions:
            if question.id in answers:
                description = question.reference["description"]
                if not description:
                    raise ValueError(
                        f"the image {question.id!r} has no description for the judge, who cannot see it; add one to "
                        f"{DESCRIPTIONS} in its folder, or leave the judge out and let people judge"
                    )
                yield (
                    question.id,
                    self.judge_prompts[question.groups["task"]].format(
                        prompt=question.prompt, description=description, answer=answers[question.id]
                    ),
                )


def _images(folder: Path) -> list[tuple[Path, str | None]]:
    """The images of one task with their descriptions, sorted by name."""
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {str(folder)!r}; this task needs {', '.join(PROMPTS)}, each with its images"
        )
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"{str(folder)!r} holds no image; put the images of this task there")
    if not (folder / DESCRIPTIONS).exists():
        return [(image, None) for image in images]
    descriptions: dict[str, str] = {}
    names = {image.name for image in images}
    for number, row in enumerate(read_json_lines(folder / DESCRIPTIONS), start=1):
        where = f"line {number} of {str(folder / DESCRIPTIONS)!r}"
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("image", "description")):
            raise ValueError(f'{where} is not of the form {{"image": "01.jpg", "description": "..."}}')
        if row["image"] not in names:
            raise ValueError(f"{where} is about {row['image']!r}, which is not in the folder; correct one of the two")
        if row["image"] in descriptions:
            raise ValueError(f"{where} repeats {row['image']!r}; keep one")
        descriptions[row["image"]] = row["description"]
    return [(image, descriptions.get(image.name)) for image in images]
