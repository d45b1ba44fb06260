"""
ScienceQA with a text-only language model, as in the LLaVA paper: its own answers, and two ensembles with a model's.

Answers are read exactly as the authors' scripts read them, with one exception: where those draw an option at random,
because they cannot read a letter or the letter is none of the options, a question counts as unanswered here.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from transformers_minigpt4.data.scienceqa import answer_text, question_text
from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.llm.types import Message
from transformers_minigpt4.utils.files import JsonObject

from .evaluator import Record
from .judging import Reply, ask_all
from .scorers.choices import SCRIPT_OPTIONS, read_letter, said_letter


# The repository's builder for GPT-4 (scripts/convert_sqa_to_llava_base_prompt.py). Which format made the published
# 82.69 % is not said; the published example answer has this one.
TWO_SHOT_FORMAT = "QCM-ALE"
SHOTS = 2
TEXT_SYSTEM = "You are a helpful assistant."
TEXT_QUESTION = "Can you explain {question}?"
TEXT_OPENING = "Answer:"  # what the text model's answer is to continue
# Ours: the authors' prompt for the judge is unpublished.
JUDGE_PROMPT = (
    "{question}\n\n"
    "Two assistants gave different answers. Some of these questions come with a picture; one of the two saw it.\n\n"
    "[First answer]\n{first}\n[End of first answer]\n\n[Second answer]\n{second}\n[End of second answer]\n\n"
    "Give your own final answer, based on the question and these two. End with the sentence "
    '"The answer is X.", where X is the letter of one option.'
)
JUDGE_PROMPT_NOTE = "the judge's prompt is this package's own, because the authors' is unpublished"

Reference: TypeAlias = JsonObject  # of a question, see [`reference`]


def draw_examples(train: Mapping[str, JsonObject], seed: int = 0) -> list[str]:
    """Ids of the two-shot prompt's examples, drawn from the training split; the authors' two are unpublished."""
    return random.Random(seed).sample(list(train), SHOTS) if len(train) >= SHOTS else []


def reference(problem: JsonObject, examples: Sequence[JsonObject], prompt_format: str = TWO_SHOT_FORMAT) -> Reference:
    """
    What an ensemble has to know of a problem.

    Args:
        problem: One of `data.scienceqa.read_split`.
        examples: Problems for the text model's prompt.
        prompt_format: Their format and the question's.

    Returns:
        `choices`, `correct` (from 0), `question` (for the judge), and `two_shot`: the messages for the text model.
    """
    return {
        "choices": problem["choices"],
        "correct": problem["answer"],
        "question": question_text(problem, "CQM"),
        "two_shot": two_shot(problem, examples, prompt_format),
    }


def two_shot(
    problem: JsonObject, examples: Sequence[JsonObject], prompt_format: str = TWO_SHOT_FORMAT
) -> list[Message]:
    """The text model's messages: the authors', for any number of examples. The last one begins its answer."""
    question_format, _, answer_format = prompt_format.partition("-")
    messages: list[Message] = [{"role": "system", "content": TEXT_SYSTEM}]
    for shown in (*examples, problem):
        question = TEXT_QUESTION.format(question=question_text(shown, question_format))
        messages.append({"role": "user", "content": question})
        answer = TEXT_OPENING if shown is problem else answer_text(shown, answer_format, escaped=True)
        messages.append({"role": "assistant", "content": answer})
    return messages


def as_sentence(answer: str) -> str:
    """A letter alone, or followed by ". ", as the sentence that [`said_letter`] reads; any other answer as it is."""
    letter = read_letter(answer)
    return answer if letter is None else f"The answer is {letter}."


def ask_text_model(references: Mapping[str, Reference], model: ChatModel) -> dict[str, str]:
    """
    A text-only model's answers by id; empty where the endpoint refused to answer.

    Raises:
        JudgeStopped: as [`~evaluation.judging.ask_all`].
    """
    conversations = ((pid, reference["two_shot"]) for pid, reference in references.items())
    return _texts(ask_all(model, conversations, "text model"))


def ask_judge(
    references: Mapping[str, Reference], own: Mapping[str, str], text: Mapping[str, str], judge: ChatModel
) -> dict[str, str]:
    """
    The judge's answers to the questions that own and text model answered with different letters, by id.

    It is asked where the text model names a letter and the other model another one, or none.

    Raises:
        JudgeStopped: as [`~evaluation.judging.ask_all`].
    """
    conversations: list[tuple[str, list[Message]]] = []
    for pid, reference in references.items():
        if pid not in own or pid not in text:
            continue
        letter = said_letter(text[pid])
        if letter is not None and letter != said_letter(own[pid]):
            prompt = _judge_prompt(pid, reference["question"], own[pid], text[pid])
            conversations.append((pid, [{"role": "user", "content": prompt}]))
    return _texts(ask_all(judge, conversations, "judge"))


def combine(reference: Reference, own: str, text: str, judged: str | None = None) -> Record:
    """
    The outcome of one question.

    Args:
        reference: Its choices and the right one.
        own: What the model that saw the image answered.
        text: What the text-only model answered.
        judged: What the judge answered, or `None` if it was not asked.

    Returns:
        For `own`, `text`, `complement` and `judge`: the option's number under the name itself, `None` if unanswered;
        `NAME_correct` and `NAME_unanswered` as 0 or 1. Also `upper_bound_correct` (own or complement is right),
        `text_no_answer` (no letter can be read) and `judge_asked`, `judge_unreadable`, the latter `None` if not asked.
    """
    letters = {"own": said_letter(own), "text": said_letter(text), "judge": said_letter(judged or "")}
    # What cannot be read is replaced by the model's own answer; a letter that is no option is not.
    chosen: dict[str, int | None] = {
        "own": _option(letters["own"], reference),
        "text": _option(letters["text"], reference),
    }
    chosen["complement"] = chosen["own"] if letters["text"] is None else chosen["text"]
    chosen["judge"] = chosen["own"] if letters["judge"] is None else _option(letters["judge"], reference)
    record: Record = {}
    for name, number in chosen.items():
        record[name] = number
        record[f"{name}_correct"] = int(number == reference["correct"])
        record[f"{name}_unanswered"] = int(number is None)
    record["upper_bound_correct"] = int(record["own_correct"] or record["complement_correct"])
    record["text_no_answer"] = int(letters["text"] is None)
    record["judge_asked"] = int(judged is not None)
    record["judge_unreadable"] = None if judged is None else int(letters["judge"] is None)
    return record


def _option(letter: str | None, reference: Reference) -> int | None:
    """The number of the option that a letter names; `None` for no letter and for one beyond the options."""
    options = SCRIPT_OPTIONS[: len(reference["choices"])]
    return options.index(letter) if letter is not None and letter in options else None


def _judge_prompt(pid: str, question: str, own: str, text: str) -> str:
    first, second = own, text
    # Half of the questions in each order, so that a judge biased toward a position favors neither.
    if hashlib.sha256(pid.encode()).digest()[0] % 2:
        first, second = second, first
    return JUDGE_PROMPT.format(question=question, first=first, second=second)


def _texts(replies: Mapping[str, Reply]) -> dict[str, str]:
    return {pid: reply.received for pid, reply in replies.items()}
