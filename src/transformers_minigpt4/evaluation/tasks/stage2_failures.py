"""Table 3 of the MiniGPT-4 paper: outputs that fail by repetition, as fragments, or off-topic, on two prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers_minigpt4.curation.rules import RULES, RuleSet
from transformers_minigpt4.llm.client import ChatModel

from ..evaluator import Metric, Question, Record, Task, mean
from ..judging import YES_NO, judge_all
from .coco_coverage import captioned_images


PROMPTS = {
    "detail": "Describe the image in detail.",
    "poem": "Can you write a beautiful poem about this image?",
}
IMAGES = 100  # of Table 3
# The rules of curation that make each kind. A text counts by the first kind that holds.
KINDS = {
    "repetition": ("repeated_words", "repeated_phrases", "repeated_sentences"),
    "fragment": ("too_short", "fragment", "unfinished"),
}
# A poem may have a refrain of repeated lines; text that is mostly repetition is not a refrain.
_POEM: dict[str, Any] = {"repeated_sentences": False, "repeated_phrases": {"max_share": 0.5}}
JUDGE_PROMPT = (
    "People described a picture:\n{captions}\n\nAn assistant that saw the picture was asked: {prompt}\nIt answered:\n"
    "{answer}\n\nDoes the answer speak about the picture that the people described? It may say more than they do, and "
    "a poem may say it in images, but an answer about another scene, about nothing in particular or about the "
    "assistant itself does not. Answer with the one word yes or no."
)


class Stage2Failures(Task):
    """
    The share of failed outputs, per prompt, on 100 images of COCO.

    The paper counted by hand. Here repetition and fragments are found by the rules of curation (`curation/rules.py`),
    and a judge decides whether the other texts are about the image that the ground-truth captions describe. Without a
    judge, off-topic texts go unnoticed.
    """

    name = "stage2_failures"
    paper = "MiniGPT-4, Table 3"
    description = "outputs that repeat themselves, are fragments or off-topic; evaluate before and after stage 2"
    data = "captions_val2014.json or captions_val2017.json (also in annotations/), and the images"
    dataset = "coco captions"
    split = "validation"
    prompts = PROMPTS
    judge_prompts = {"off_topic": JUDGE_PROMPT}
    generation = {"max_new_tokens": 300}
    primary = "failure"
    metrics = (
        Metric("failure", False, "%", mean("failure", scale=100)),
        *(
            Metric(f"{what}/{prompt}", False, "%", mean(what, scale=100, where=("prompt", prompt)))
            for prompt in PROMPTS
            for what in ("failure", "repetition", "fragment", "off_topic")
        ),
        Metric("unreadable", None, "%", mean("unreadable", scale=100)),
    )

    def __init__(self) -> None:
        used = {name for names in KINDS.values() for name in names}
        others = {rule.name: False for rule in RULES if rule.name not in used}
        self._rules = {"detail": RuleSet(others), "poem": RuleSet(others | _POEM)}

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        """
        Both prompts about each of 100 images, drawn at random with seed 0 if there are more.

        Raises:
            ValueError: as [`coco_coverage.captioned_images`].
        """
        return [
            Question(f"{key}/{name}", prompt, (str(image),), {"captions": captions}, {"prompt": name})
            for key, image, captions in captioned_images(data, IMAGES)
            for name, prompt in PROMPTS.items()
        ][:limit]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        """
        `failure`, the columns of its kinds, and `kind` and `why` in words.

        A question without an answer is a failure of the kind `no answer`. If the judge was unreadable, `failure` has
        no value.

        Raises:
            JudgeStopped: as [`judging.judge_all`].
        """
        found = {q.id: self._by_rule(q.groups["prompt"], answers[q.id]) for q in questions if q.id in answers}
        prompts = [
            (question.id, _judge_question(question, answers[question.id]))
            for question in questions
            if question.id in found and found[question.id] is None
        ]
        verdicts = judge_all(judge, prompts, YES_NO) if judge is not None else {}
        records: list[Record] = []
        for question in questions:
            kind, why = found.get(question.id, ("no answer", "")) or (None, "")
            off_topic = unreadable = None
            if question.id in verdicts:
                verdict = verdicts[question.id]
                unreadable = int(verdict.value is None)
                off_topic = None if verdict.value is None else int(not verdict.value)
                kind, why = ("off-topic" if off_topic else kind), verdict.text
            elif kind is not None and judge is not None:
                off_topic = 0
            records.append(
                {
                    "failure": None if unreadable else int(kind is not None),
                    **{name: int(kind == name) for name in KINDS},
                    "off_topic": off_topic,
                    "unreadable": unreadable,
                    "kind": kind,
                    "why": why,
                }
            )
        return records

    def _by_rule(self, prompt: str, text: str) -> tuple[str, str] | None:
        """Kind and reason of a failure, found by rules only."""
        broken = dict(self._rules[prompt].check(text))
        for kind, names in KINDS.items():
            for name in names:
                if name in broken:
                    return kind, f"{name}: {broken[name]}"
        return None


def _judge_question(question: Question, answer: str) -> str:
    captions = "\n".join(f"- {caption}" for caption in question.reference["captions"])
    return JUDGE_PROMPT.format(captions=captions, prompt=question.prompt, answer=answer)
