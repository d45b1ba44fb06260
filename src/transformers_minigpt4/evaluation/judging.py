"""Asks a judge: answers in a strict format, one retry for an unreadable answer, candidates in both orders."""

import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from tqdm import tqdm

from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.llm.types import ChatAnswer, ChatError, Message


K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# Failures of one question and its answer. All others are the endpoint's, and say nothing about the judged text.
_NO_ANSWER = frozenset({"filtered", "refused"})
_OF_THE_ANSWER = frozenset({"cut_off", "empty"}) | _NO_ANSWER
_GIVE_UP_AFTER = 20  # consecutive failures of the endpoint, each after all retries
_MARKS = " \t\r\n\"'`*_.!"


class JudgeStopped(RuntimeError):
    """The judge failed on some questions, so there is no score; its earlier answers are kept in the cache."""


@dataclass(frozen=True)
class ResponseFormat(Generic[T]):
    """
    The format that a judge must answer in.

    Args:
        parse: From an answer to its value; `None` if it is in another format.
        reminder: What the judge is told once after an answer in another format.
    """

    parse: Callable[[str], T | None]
    reminder: str


@dataclass(frozen=True)
class Reply:
    """
    What a chat model answered to one question.

    `text` is without white space at its ends, `received` with it; both are empty if the endpoint gave no answer, for
    the reason `failure`: `"filtered"` or `"refused"`, see [`~transformers_minigpt4.llm.types.KINDS`].
    """

    text: str
    received: str
    failure: str | None = None


@dataclass(frozen=True)
class Verdict(Generic[T]):
    """What a judge answered: `value` is `None` if it was unreadable twice; `first` is the reply before a reminder."""

    value: T | None
    text: str
    first: Reply


def parse_yes_no(text: str) -> bool | None:
    """`True` or `False` for an answer that is the word yes or no, in any case, quoted or not; else `None`."""
    return {"yes": True, "no": False}.get(text.strip(_MARKS).lower())


def parse_two_scores(text: str) -> tuple[float, float] | None:
    """The two scores from 1 to 10 that make up an answer's first line, separated by space or comma; else `None`."""
    lines = text.strip().splitlines() or [""]
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:\s*,\s*|\s+)(\d+(?:\.\d+)?)", lines[0].strip(_MARKS))
    if match is None:
        return None
    first, second = float(match[1]), float(match[2])
    return (first, second) if 1 <= first <= 10 and 1 <= second <= 10 else None


YES_NO: ResponseFormat[bool] = ResponseFormat(
    parse_yes_no, "That answer cannot be used. Answer the question with the one word yes or no and nothing else."
)
TWO_SCORES: ResponseFormat[tuple[float, float]] = ResponseFormat(
    parse_two_scores,
    "That answer cannot be used. Write the two scores, numbers from 1 to 10, on the first line, with a space between "
    "them and nothing else on that line.",
)


def need_judge(judge: ChatModel | None, task: str) -> ChatModel:
    """
    The judge of a task that needs one.

    Raises:
        ValueError: if there is none.
    """
    if judge is None:
        raise ValueError(
            f"the task {task} is scored by a judge, but none is given; name one, see docs/guides/evaluate.md"
        )
    return judge


def ask_all(
    judge: ChatModel, conversations: Iterable[tuple[K, list[Message]]], progress: str = "asking"
) -> dict[K, Reply]:
    """
    Ask a chat model many questions, each once.

    Args:
        judge: A chat model; with a cache, questions of an earlier run cost nothing.
        conversations: Key and messages. Keys must differ.
        progress: Label of the progress bar.

    Returns:
        One reply per key; an empty or cut-off answer is one, too.

    Raises:
        JudgeStopped: if the endpoint failed, after its retries, on at least one question. All others have been asked
            by then, unless the failure concerns all (a wrong key, a spent budget) or many failures in a row showed
            that the endpoint is gone.
    """
    replies: dict[K, Reply] = {}
    for key, answer in _answers(judge, dict(conversations), progress):
        # The beginning of a cut-off answer may hold all that is asked for.
        said = answer.answer if isinstance(answer, ChatError) else answer
        failure = answer.kind if isinstance(answer, ChatError) and answer.kind in _NO_ANSWER else None
        text = said.text if said is not None else ""
        replies[key] = Reply(text, said.received if said is not None and said.received is not None else text, failure)
    return replies


def judge_all(
    judge: ChatModel,
    prompts: Iterable[tuple[K, str | list[Message]]],
    response_format: ResponseFormat[T],
    progress: str = "judging",
) -> dict[K, Verdict[T]]:
    """
    Ask a judge many questions.

    After an answer in another format, or an empty or cut-off one, the judge is asked once more, with its first answer
    and the reminder; if that is unreadable too, the verdict has no value and counts neither for nor against.

    Args:
        judge: A chat model; with a cache, questions of an earlier run cost nothing.
        prompts: Key and question, or the messages of a conversation. Keys must differ.
        response_format: The format of the answers.
        progress: Label of the progress bar.

    Returns:
        One verdict per key.

    Raises:
        JudgeStopped: as [`ask_all`].
    """
    asked = {key: _conversation(prompt) for key, prompt in prompts}
    # A repeated question is asked once: it costs once, and a run from the cache gives the same answers.
    digests = {key: json.dumps(messages) for key, messages in asked.items()}
    questions = {digests[key]: messages for key, messages in asked.items()}
    first = ask_all(judge, questions.items(), progress)
    verdicts = {key: Verdict(response_format.parse(reply.text), reply.text, reply) for key, reply in first.items()}
    again = {
        key: [
            *questions[key],
            {"role": "assistant", "content": verdict.text or "(nothing)"},
            {"role": "user", "content": response_format.reminder},
        ]
        for key, verdict in verdicts.items()
        if verdict.value is None
    }
    if again:
        for key, reply in ask_all(judge, again.items(), f"{progress}, asked again").items():
            verdicts[key] = Verdict(response_format.parse(reply.text), reply.text, first[key])
    return {key: verdicts[digest] for key, digest in digests.items()}


def _conversation(prompt: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def judge_in_both_orders(
    judge: ChatModel,
    pairs: Iterable[tuple[K, Callable[[str, str], str | list[Message]], str, str]],
    response_format: ResponseFormat[tuple[float, float]] = TWO_SCORES,
    progress: str = "judging",
) -> dict[K, Verdict[tuple[float, float]]]:
    """
    Score two candidates against each other, once in each order, because judges favor a position.

    Args:
        judge: A chat model.
        pairs: Key, function that writes the question about a first and a second candidate, and the two candidates.
        response_format: Gives the scores of the first and the second.
        progress: Label of the progress bar.

    Returns:
        For each key the means over both orders, in the given order; no value if one of the two was unreadable, because
        the other alone would carry the bias of its position. `first` is the first reply to the given order.

    Raises:
        JudgeStopped: as [`judge_all`].
    """
    prompts = [
        ((key, swapped), write(second, first) if swapped else write(first, second))
        for key, write, first, second in pairs
        for swapped in (False, True)
    ]
    single = judge_all(judge, prompts, response_format, progress)
    both: dict[K, Verdict[tuple[float, float]]] = {}
    for key, swapped in single:
        if not swapped:
            forth, back = single[key, False], single[key, True]
            value = None
            if forth.value is not None and back.value is not None:
                value = ((forth.value[0] + back.value[1]) / 2, (forth.value[1] + back.value[0]) / 2)
            both[key] = Verdict(value, f"{forth.text}\n--- in the other order ---\n{back.text}", forth.first)
    return both


def _answers(
    judge: ChatModel, questions: dict[K, list[Message]], progress: str
) -> Iterator[tuple[K, ChatAnswer | ChatError]]:
    """The answers in any order; failures of the endpoint are raised at the end, or when they do not stop."""
    failures: list[ChatError] = []
    answered = in_a_row = 0
    with tqdm(total=len(questions), desc=progress, disable=None) as bar:
        try:
            for key, answer in judge.complete_many(questions.items()):
                bar.update()
                if isinstance(answer, ChatError) and answer.kind not in _OF_THE_ANSWER:
                    failures.append(answer)
                    in_a_row += 1
                    if in_a_row == _GIVE_UP_AFTER:
                        break
                    continue
                in_a_row = 0
                answered += 1
                yield key, answer
        except ChatError as error:
            failures.insert(0, error)
    if failures:
        raise JudgeStopped(
            f"the judge {judge.name!r} answered {answered} of {len(questions)} questions, then: {failures[0]}; its "
            "answers are kept if there is a cache, so run the same command again once that is fixed"
        ) from failures[0]
