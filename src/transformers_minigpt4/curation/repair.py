"""The repair step: a language model fixes each text, and suspicious changes are flagged for review."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.llm.opening import open_chat_model
from transformers_minigpt4.llm.types import ChatAnswer, ChatError, Usage, prefixed

from .config import CONFIG_FILE, REPAIR, CurationConfig, settings_hash
from .database import write_results
from .progress import bar
from .records import Result, Work
from .repair_checks import VERSION, flags
from .settings_file import CurationError
from .spending import ANSWERS, PaidRun, answer_details, explained, spent_before, usage_line
from .store import Project


STEP = "repair"
OK, FLAGGED, FAILED = "ok", "flagged", "failed"
_CUT_OFF = "cut off"
_QUOTED = re.compile(r'^(["“])(.*)(["”])$', re.DOTALL)


@dataclass(frozen=True)
class RepairSummary:
    """
    The result of a run of the repair.

    Args:
        outcomes: How many texts are `ok`, `flagged` or `failed`.
        reasons: How many were flagged or failed for each reason, the most common first.
        errors: For each reason of a failure, the message for the first text.
        changed: How many texts were changed.
        usage: What this run used; `total` includes earlier runs.
        failure: Whether every text failed. Not if all had failed before while others are repaired: a few hopeless
            texts must not keep the rest from the next step.
    """

    outcomes: dict[str, int]
    reasons: dict[str, int]
    errors: dict[str, str]
    changed: int
    usage: Usage
    total: Usage
    failure: bool = False

    def check(self) -> None:
        """
        Raises:
            CurationError: if every text failed.
        """
        if self.failure:
            raise CurationError(
                f"the repair failed for all {self.outcomes[FAILED]} texts, for the reasons above; the same "
                "command tries them again"
            )

    def __str__(self) -> str:
        if not self.outcomes:
            return "repair: nothing to do, all texts have been repaired with these settings"
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.items())
        lines = [
            f"repair: {sum(self.outcomes.values())} texts: {counts}; {self.changed} changed",
            usage_line(self.usage, self.total),
        ]
        for reason, count in self.reasons.items():
            error = self.errors.get(reason)
            lines.append(f"  {count:>7}  {reason}{f', such as: {error}' if error else ''}")
        if self.outcomes.get(FAILED):
            lines.append("failed texts are tried again by the next `minigpt4 curate repair`")
        return "\n".join(lines)


def run_repair(project: Project, config: CurationConfig, progress: bool = True) -> RepairSummary:
    """
    Has the project's language model repair every text that has not been repaired with these settings yet.

    Each result is on the disk before the next one is waited for, along with the usage so far. After a kill, an answer
    that was in the cache already is not paid for again; the next run counts as many requests as were allowed in
    flight, with the most that each can have used. The budget is the project's: earlier runs count.

    Args:
        project: Open.
        config: Its settings.
        progress: Whether to show a bar on a terminal.

    Raises:
        CurationError: if no model is named, or while another process runs a step.
        ChatError: for what affects every text: a refused key, nothing at the address, an exhausted budget. Finished
            work is kept.
        ValueError: for settings that cannot work, or a local model that cannot be loaded.
    """
    settings = config.chat_settings()
    with project.writer(STEP):
        digest = repair_digest(config)
        spent = spent_before(project)
        works = {work.pair.id: work for work in _works(project, config, digest)}
        before = {pair.id: result.outcome for pair, result in project.current(STEP) if result.settings == digest}
        if not works:
            return RepairSummary({}, {}, {}, 0, Usage(), spent)
        with open_chat_model(settings, project.folder / ANSWERS, spent) as model:
            run = _Run(project, config, digest, works, model)
            try:
                run.go(progress)
            except ChatError as error:
                run.close()
                raise explained(error, REPAIR, CONFIG_FILE, len(works) - run.left, run.left) from error
            run.close()
            failed_before = all(before.get(pair_id) == FAILED for pair_id in works)
            others = any(outcome != FAILED for outcome in before.values())
            return run.summary(spent, hopeless=failed_before and others)


def repair_digest(config: CurationConfig) -> str:
    """
    Changes with what decides a repair: model, prompt, temperature, checks.

    It does not change with the endpoint's address, which may move, nor with the longest answer, which matters only
    for answers that were cut off.
    """
    settings = config.chat_settings()
    return settings_hash(STEP, VERSION, settings.model, config.repair_prompt, settings.temperature)


def _works(project: Project, config: CurationConfig, digest: str) -> Iterator[Work]:
    """What is pending, and what was cut off if longer answers are allowed now."""
    yield from project.pending(STEP, digest)
    short = {
        pair.id: result
        for pair, result in project.current(STEP)
        if result.settings == digest
        and _CUT_OFF in result.details.get("flags", ())
        and result.details["max_tokens"] < config.chat_settings().max_tokens
    }
    if short:
        yield from (Work(pair, text, short[pair.id].input) for pair, text in project.texts(STEP) if pair.id in short)


class _Run:
    """One run of the step, with its counts."""

    def __init__(
        self, project: Project, config: CurationConfig, digest: str, works: dict[int, Work], model: ChatModel
    ) -> None:
        self.project, self.config, self.digest, self.works, self.model = project, config, digest, works, model
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.errors: dict[str, str] = {}
        self.changed = 0
        self.left = len(works)
        longest = max(len(work.text.encode(errors="replace")) for work in works.values())
        self._paid = PaidRun(project, model, len(works), longest + len(config.repair_prompt.encode()))

    def go(self, progress: bool) -> None:
        requests = (
            (work.pair.id, [{"role": "user", "content": f"{self.config.repair_prompt}\n\n{work.text}"}])
            for work in self.works.values()
            if work.text.strip()
        )
        with bar(STEP, len(self.works), shown=progress) as done:
            for work in self.works.values():
                if not work.text.strip():
                    self._record(Result(work.pair.id, self.digest, work.input, OK), done)
            for pair_id, answer in self.model.complete_many(requests):
                self._record(self._judge(self.works[pair_id], answer), done)

    def _judge(self, work: Work, answer: ChatAnswer | ChatError) -> Result:
        found: dict[str, str] = {}
        if isinstance(answer, ChatError):
            if answer.answer is None or not answer.answer.text:
                why = {"model": self.model.name, "error": prefixed(str(answer), REPAIR)}
                return Result(work.pair.id, self.digest, work.input, FAILED, answer.kind, None, why)
            found[_CUT_OFF] = f"at {answer.answer.completion_tokens} tokens"
            answer = answer.answer
        text = _unquoted(answer.text, work.text)
        found |= flags(work.text, text, self.config.repair_prompt)
        details = {**answer_details(self.model, answer), "flags": found}
        outcome = FLAGGED if found else OK
        return Result(work.pair.id, self.digest, work.input, outcome, ", ".join(found), text, details)

    def _record(self, result: Result, done: Callable[[int], object]) -> None:
        with self.project.transaction() as connection:
            write_results(connection, STEP, [result])
            self._paid.write(connection)
        self.left -= 1
        self.outcomes[result.outcome] += 1
        self.reasons.update(result.reason.split(", ") if result.reason else ())
        if result.outcome == FAILED:
            self.errors.setdefault(result.reason, result.details["error"])
        self.changed += result.text is not None and result.text != self.works[result.pair_id].text
        done(1)

    def close(self) -> None:
        """Ends the run, see [`PaidRun`]."""
        self._paid.close()

    def summary(self, spent: Usage, hopeless: bool) -> RepairSummary:
        usage = self.model.usage
        outcomes = {name: self.outcomes[name] for name in (OK, FLAGGED, FAILED) if self.outcomes[name]}
        failure = list(outcomes) == [FAILED] and not hopeless
        return RepairSummary(
            outcomes, dict(self.reasons.most_common()), self.errors, self.changed, usage, spent + usage, failure
        )


def _unquoted(text: str, source: str) -> str:
    """Without the quotes that some models put around the complete answer."""
    found = _QUOTED.match(text)
    if found and not _QUOTED.match(source.strip()) and not set(found[2]) & {found[1], found[3]}:
        return found[2].strip()
    return text
