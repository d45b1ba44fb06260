"""What a project's requests to a language model use: counted by run, kept through a kill, within one budget."""

import contextlib
import json
import sqlite3

from transformers_minigpt4.llm.cache import AnswerCache
from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.llm.types import BudgetExhausted, ChatAnswer, ChatError, Usage, prefixed
from transformers_minigpt4.utils.files import JsonObject

from .records import now
from .store import AnyProject


ANSWERS = "answers.sqlite"  # in the project's folder, so that changing a prompt back costs nothing
_IN_FLIGHT = "requests in flight"  # key in the project's `meta` during a run
_TEMPLATE_TOKENS = 100  # of a chat template around a message, generously
_INSERT = (
    "INSERT INTO requests (at, model, requests, cached, prompt_tokens, completion_tokens, cost) "
    "VALUES (?, ?, ?, 0, ?, ?, ?)"
)


def used_so_far(project: AnyProject) -> Usage:
    """What all runs of a project have used."""
    columns = "total(requests), total(cached), total(prompt_tokens), total(completion_tokens), total(cost)"
    *counts, cost = project.connection().execute(f"SELECT {columns} FROM requests").fetchone()
    requests, cached, prompt_tokens, completion_tokens = map(int, counts)
    return Usage(requests, cached, prompt_tokens, completion_tokens, cost)


def spent_before(project: AnyProject) -> Usage:
    """
    As [`used_so_far`], with what the last run used and could not write before it was killed: the answers that the
    cache has since, and what was in flight, which may be billed.
    """
    if left := project.meta(_IN_FLIGHT):
        lost = json.loads(left)
        used = Usage(lost["requests"], 0, lost["prompt_tokens"], lost["completion_tokens"], lost["cost"])
        with contextlib.closing(AnswerCache(project.folder / ANSWERS)) as cache:
            used += cache.since(lost.get("position", 0))
        row = now(), lost["model"], used.requests, used.prompt_tokens, used.completion_tokens, used.cost
        with project.transaction() as connection:
            connection.execute(_INSERT, row)
            connection.execute("DELETE FROM meta WHERE key = ?", (_IN_FLIGHT,))
    return used_so_far(project)


class PaidRun:
    """
    One run of requests: its row in the table `requests`, and what a kill would lose.

    Args:
        project: Open.
        model: The model that is asked.
        requests: How many conversations there are.
        longest: Bytes of the longest; a byte is at most one token.
    """

    def __init__(self, project: AnyProject, model: ChatModel, requests: int, longest: int) -> None:
        self._project, self._model = project, model
        settings = model.settings
        most = min(settings.concurrency, requests)
        prompt, answer = most * (longest + _TEMPLATE_TOKENS), most * settings.max_tokens
        self._in_flight: JsonObject = {
            "model": model.name,
            "requests": most,
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "cost": settings.cost(prompt, answer),
        }
        with project.transaction() as connection:
            self._row = connection.execute(_INSERT, (now(), model.name, 0, 0, 0, 0.0)).lastrowid
            self.write(connection)

    def write(self, connection: sqlite3.Connection) -> None:
        """Writes what the run has used so far, within the caller's transaction."""
        # Before the usage, which counts a request before its answer is stored: nothing is missed between the two.
        position = self._model.cache.position() if self._model.cache is not None else 0
        usage = self._model.usage
        in_flight = json.dumps({**self._in_flight, "position": position})
        connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_IN_FLIGHT, in_flight))
        connection.execute(
            "UPDATE requests SET requests = ?, cached = ?, prompt_tokens = ?, completion_tokens = ?, cost = ? "
            "WHERE id = ?",
            (usage.requests, usage.cached, usage.prompt_tokens, usage.completion_tokens, usage.cost, self._row),
        )

    def close(self) -> None:
        """Writes what was used since the last result, also by failed requests; nothing is in flight any more."""
        with self._project.transaction() as connection:
            self.write(connection)
            connection.execute("DELETE FROM meta WHERE key = ?", (_IN_FLIGHT,))


def answer_details(model: ChatModel, answer: ChatAnswer) -> JsonObject:
    """What the history keeps of an answer: who gave it, and what it used."""
    return {
        "model": model.name,
        "max_tokens": model.settings.max_tokens,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "cost": answer.cost,
        "cached": answer.cached,
    }


def usage_line(usage: Usage, total: Usage) -> str:
    """What a run and all runs have used, in words."""
    return (
        f"{usage.requests} requests, {usage.cached} answers from earlier runs, {usage.tokens:,} tokens, cost "
        f"{usage.cost:.4f} (all runs: {total.tokens:,} tokens, {total.cost:.4f})"
    )


def explained(error: ChatError, prefix: str, file: str, done: int, left: int) -> ChatError:
    """
    An error that stops a run, with the names of the project's settings and how to resume.

    Args:
        error: What the model raised.
        prefix: What precedes the names of its settings.
        file: Where these are.
        done: Texts of this run that have an answer.
        left: Texts that have none.
    """
    kept = f"the {done} texts of this run are kept and {left} are left" if done else f"{left} texts are left"
    message = f"{prefixed(str(error), prefix)} (settings in {file}; {kept}: run the same command again)"
    if error.kind == "budget":
        return BudgetExhausted(message)
    return ChatError(error.kind, message, fatal=True)
