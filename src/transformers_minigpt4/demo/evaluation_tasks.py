"""The evaluation's tasks on the toy world, and a judge that knows it."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from transformers_minigpt4.evaluation.evaluator import Question, Record, Task
from transformers_minigpt4.evaluation.tasks.aokvqa import AOKVQA
from transformers_minigpt4.evaluation.tasks.aokvqa import DIRECT_ANSWER as AOKVQA_DIRECT
from transformers_minigpt4.evaluation.tasks.aokvqa import MULTIPLE_CHOICE as AOKVQA_CHOICE
from transformers_minigpt4.evaluation.tasks.chair import CHAIR
from transformers_minigpt4.evaluation.tasks.coco_coverage import JUDGE_PROMPT as COVERS
from transformers_minigpt4.evaluation.tasks.coco_coverage import CocoCoverage
from transformers_minigpt4.evaluation.tasks.gqa import GQA
from transformers_minigpt4.evaluation.tasks.gqa import PROMPT as GQA_PROMPT
from transformers_minigpt4.evaluation.tasks.stage2_failures import JUDGE_PROMPT as OFF_TOPIC
from transformers_minigpt4.evaluation.tasks.stage2_failures import Stage2Failures
from transformers_minigpt4.llm.client import ChatModel, Key
from transformers_minigpt4.llm.types import ChatAnswer, ChatSettings, Message

from .evaluation_data import DATASET
from .run import MAX_NEW_TOKENS
from .scoring import ASKED, named_values
from .world import ATTRIBUTES


class TruthJudge(ChatModel):
    """
    Answers the judges' questions about the toy world by rule, in place of a language model.

    A text covers a caption when it names every attribute that the caption names, with the same value and no other. It
    is about the image when it names at least three of the four attributes in this way, which is the demo's own rule.
    """

    def __init__(self) -> None:
        super().__init__(ChatSettings(model="the demo's rules"))

    def identity(self) -> str:
        return "rules"

    def complete_many(self, requests: Iterable[tuple[Key, list[Message]]]) -> Iterator[tuple[Key, ChatAnswer]]:
        for key, messages in requests:
            yes = self._says_yes(messages[-1]["content"])
            yield key, ChatAnswer("yes" if yes else "no", "stop", 0, 0, 0.0)

    def _says_yes(self, prompt: str) -> bool:
        if fields := unfilled(COVERS, prompt):
            truth, named = named_values(fields["caption"]), named_values(fields["answer"])
            return all(named[attribute] == values for attribute, values in truth.items() if values)
        if fields := unfilled(OFF_TOPIC, prompt):
            truth, named = named_values(fields["captions"]), named_values(fields["answer"])
            return sum(named[attribute] == truth[attribute] for attribute in ATTRIBUTES) >= len(ATTRIBUTES) - 1
        raise ValueError(f"the demo's judge does not know this question: {prompt[:80]!r}")


def unfilled(template: str, text: str) -> dict[str, str] | None:
    """The values of the `{fields}` of the template that a text was made from; `None` if it was made from another."""
    match = _pattern(template).fullmatch(text)
    return match.groupdict() if match else None


@lru_cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    pattern = "".join(f"(?P<{piece}>.*?)" if place % 2 else re.escape(piece) for place, piece in enumerate(pieces))
    return re.compile(pattern, re.DOTALL)


class _OnlyDescriptions(Stage2Failures):
    """Leaves the poem out, which the demo's language model has never learned to write."""

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        return [question for question in super().questions(data) if question.groups["prompt"] == "detail"][:limit]


class _PlainQuestions(Task):
    """
    Asks the bare question, which is all that the demo's language model has learned, and reads its sentences.

    "It is red." answers the question for the colour with "red": each answer counts as the one value that it names. One
    that names none or several is left unchanged, and is wrong.

    Args:
        task: The task whose questions to ask.
        templates: Its prompts, with the field `{question}`.
    """

    def __init__(self, task: Task, *templates: str) -> None:
        self.task, self.templates = task, templates
        for attribute in Task.__annotations__:
            setattr(self, attribute, getattr(task, attribute))
        self.prompts = {"question": "{question}"}

    def questions(self, data: Path, limit: int | None = None) -> list[Question]:
        return [replace(question, prompt=self._bare(question.prompt)) for question in self.task.questions(data, limit)]

    def score(
        self, questions: Sequence[Question], answers: Mapping[str, str], judge: ChatModel | None = None
    ) -> list[Record]:
        read = {q.id: _value(q.prompt, answers[q.id]) for q in questions if q.id in answers}
        return self.task.score(questions, read, judge)

    def _bare(self, prompt: str) -> str:
        for template in self.templates:
            if fields := unfilled(template, prompt):
                return fields["question"]
        raise ValueError(f"the task {self.name} has prompts that the demo does not know: {prompt[:80]!r}")


def _value(question: str, text: str) -> str:
    values = named_values(text)[ASKED[question][0]]
    return next(iter(values)) if len(values) == 1 else text


def demo_tasks() -> list[Task]:
    """The tasks of the paper's Tables 2 to 5 with the demo's names, limits of length and questions."""
    descriptions = _OnlyDescriptions()
    descriptions.prompts = {"detail": Stage2Failures.prompts["detail"]}
    tables: list[tuple[int, Task]] = [
        (2, CocoCoverage()),
        (3, descriptions),
        (4, _PlainQuestions(AOKVQA(), AOKVQA_CHOICE, AOKVQA_DIRECT)),
        (4, _PlainQuestions(GQA(), GQA_PROMPT)),
        (5, CHAIR()),
    ]
    for table, task in tables:
        # So that nobody takes their figures for the paper's.
        task.paper = f"{DATASET}, in the manner of MiniGPT-4, Table {table}"
        task.dataset, task.split = DATASET, "held out"
        task.generation = {"max_new_tokens": MAX_NEW_TOKENS}
    return [task for _, task in tables]
