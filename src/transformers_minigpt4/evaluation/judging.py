"""Asks a judge: answers in a strict form, one further try where one cannot be read, candidates in both orders."""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.llm.types import ChatAnswer, ChatError


K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# Faults of one question and its answer. All others are the endpoint's, and say nothing about the text that is judged.
_OF_THE_ANSWER = frozenset({"cut_off", "empty", "filtered", "refused"})
_GIVE_UP_AFTER = 20  # failures of the endpoint on end, each with all its retries behind it
_MARKS = " \t\r\n\"'`*_.!"


class JudgeStopped(RuntimeError):
    """The judge failed on questions, so that there is no score; what it answered before is kept in the cache."""


@dataclass(frozen=True)
class Form(Generic[T]):
    """
    The form that a judge must answer in.

    Args:
        parse: From an answer to its value; `None` where it is in another form.
        reminder: What the judge is told once when it answered in another form.
    """

    parse: Callable[[str], T | None]
    reminder: str


@dataclass(frozen=True)
class Verdict(Generic[T]):
    """What a judge said about one thing: `value` is `None` where it could not be read twice; `text` as it came."""

    value: T | None
    text: str


def parse_yes_no(text: str) -> bool | None:
    """`True` or `False` for an answer of the one word yes or no, in any case, quoted or not; else `None`."""
    return {"yes": True, "no": False}.get(text.strip(_MARKS).lower())


def parse_two_scores(text: str) -> tuple[float, float] | None:
    """The two scores of 1 to 10 that are an answer's whole first line, apart by space or comma; else `None`."""
    lines = text.strip().splitlines() or [""]
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:\s*,\s*|\s+)(\d+(?:\.\d+)?)", lines[0].strip(_MARKS))
    if match is None:
        return None
    first, second = float(match[1]), float(match[2])
    return (first, second) if 1 <= first <= 10 and 1 <= second <= 10 else None


YES_NO: Form[bool] = Form(
    parse_yes_no, "That answer cannot be used. Answer the question with the one word yes or no and nothing else."
)
TWO_SCORES: Form[tuple[float, float]] = Form(
    parse_two_scores,
    "That answer cannot be used. Write the two scores, numbers from 1 to 10, on the first line, with a space between "
    "them and nothing else on that line.",
)


def need_judge(judge: ChatModel | None, task: str) -> ChatModel:
    """
    The judge of a task that cannot do without.

    Raises:
        ValueError: where there is none.
    """
    if judge is None:
        raise ValueError(
            f"the task {task} is scored by a judge, and none is given; name one, see docs/guides/evaluate.md"
        )
    return judge


def judge_all(
    judge: ChatModel, prompts: Iterable[tuple[K, str]], form: Form[T], progress: str = "judging"
) -> dict[K, Verdict[T]]:
    """
    Ask a judge many questions.

    An answer in another form, or an empty or cut-off one, is asked for once more with the first answer and the
    reminder; what cannot be read then has no value, so that it counts neither for nor against what was judged.

    Args:
        judge: A chat model; with a cache it answers a question of an earlier run at no cost.
        prompts: Key and question. Keys must differ.
        form: The form of the answers.
        progress: What the progress bar says.

    Returns:
        One verdict a key.

    Raises:
        JudgeStopped: when the endpoint failed, after its retries, on at least one question. All others have been
            asked by then, unless the fault concerns all (a wrong key, a budget that is spent) or a row of failures
            showed that the endpoint is gone.
    """
    asked = dict(prompts)
    # The same question twice is asked once: it costs once, and a run from the cache says what the first one said.
    questions = {prompt: [{"role": "user", "content": prompt}] for prompt in asked.values()}
    verdicts = _read(_answers(judge, questions, progress), form)
    again = {
        prompt: [
            *questions[prompt],
            {"role": "assistant", "content": verdict.text or "(nothing)"},
            {"role": "user", "content": form.reminder},
        ]
        for prompt, verdict in verdicts.items()
        if verdict.value is None
    }
    if again:
        verdicts.update(_read(_answers(judge, again, f"{progress}, asked again"), form))
    return {key: verdicts[prompt] for key, prompt in asked.items()}


def judge_in_both_orders(
    judge: ChatModel,
    pairs: Iterable[tuple[K, Callable[[str, str], str], str, str]],
    form: Form[tuple[float, float]] = TWO_SCORES,
    progress: str = "judging",
) -> dict[K, Verdict[tuple[float, float]]]:
    """
    Score two candidates against each other, once in each order, because judges favour a position.

    Args:
        judge: A chat model.
        pairs: Key, function that writes the question about a first and a second candidate, and the two candidates.
        form: Gives the scores of the first and the second.
        progress: What the progress bar says.

    Returns:
        For each key the means over both orders, in the order given; no value where one of the two could not be read,
        because the other alone would carry its position's favour.

    Raises:
        JudgeStopped: as [`judge_all`].
    """
    prompts = [
        ((key, swapped), write(second, first) if swapped else write(first, second))
        for key, write, first, second in pairs
        for swapped in (False, True)
    ]
    single = judge_all(judge, prompts, form, progress)
    both: dict[K, Verdict[tuple[float, float]]] = {}
    for key, swapped in single:
        if not swapped:
            forth, back = single[key, False], single[key, True]
            value = None
            if forth.value is not None and back.value is not None:
                value = ((forth.value[0] + back.value[1]) / 2, (forth.value[1] + back.value[0]) / 2)
            both[key] = Verdict(value, f"{forth.text}\n--- in the other order ---\n{back.text}")
    return both


def _answers(
    judge: ChatModel, questions: dict[K, list[dict[str, Any]]], progress: str
) -> Iterator[tuple[K, ChatAnswer | ChatError]]:
    """The answers in any order; faults of the endpoint are raised at the end, or when there is no end to them."""
    failures: list[ChatError] = []
    answered = on_end = 0
    with tqdm(total=len(questions), desc=progress, disable=None) as bar:
        try:
            for key, answer in judge.complete_many(questions.items()):
                bar.update()
                if isinstance(answer, ChatError) and answer.kind not in _OF_THE_ANSWER:
                    failures.append(answer)
                    on_end += 1
                    if on_end == _GIVE_UP_AFTER:
                        break
                    continue
                on_end = 0
                answered += 1
                yield key, answer
        except ChatError as error:
            failures.insert(0, error)
    if failures:
        raise JudgeStopped(
            f"the judge {judge.name!r} answered {answered} of {len(questions)} questions, then: {failures[0]}; its "
            "answers are kept where there is a cache, so run the same again when that is mended"
        ) from failures[0]


def _read(answers: Iterable[tuple[K, ChatAnswer | ChatError]], form: Form[T]) -> dict[K, Verdict[T]]:
    verdicts: dict[K, Verdict[T]] = {}
    for key, answer in answers:
        # Of an answer that was cut off, the beginning may hold all that the form asks for.
        said = answer.answer if isinstance(answer, ChatError) else answer
        text = said.text if said is not None else ""
        verdicts[key] = Verdict(form.parse(text), text)
    return verdicts
