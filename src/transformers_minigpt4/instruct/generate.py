"""Asks a language model for every row, and once more where its answer cannot be used; nothing is paid for twice."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from transformers_minigpt4.curation.config import settings_hash
from transformers_minigpt4.curation.database import write_results
from transformers_minigpt4.curation.progress import bar
from transformers_minigpt4.curation.records import FAILED, Result, Work
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.curation.spending import (
    ANSWERS,
    PaidRun,
    answer_details,
    explained,
    spent_before,
    usage_line,
)
from transformers_minigpt4.llm.client import ChatModel
from transformers_minigpt4.llm.opening import open_chat_model
from transformers_minigpt4.llm.types import ChatAnswer, ChatError, Message, Usage

from .answers import CUT_OFF, REASONS, VERSION, Refused, read_answer
from .config import CONFIG_FILE, InstructConfig
from .plan import CHARACTERS_PER_TOKEN, FIRST, answers_digest, estimate, first_works, row_messages
from .prompts import COMPLEX, CONVERSATION, DETAIL
from .sampling import Sampled, sample_rows
from .store import InstructProject


AGAIN = "repair"  # name of the second step in the history
OK = "ok"
_TOGETHER, _SECONDS = 64, 1.0  # results written in one transaction, and how long the first of them may wait
# Our own words; the article's authors do not say what they did with answers that could not be used.
_FORMS = {
    CONVERSATION: "Write all of it again: blocks that begin with `Question:` and `Answer:` in turn, with a line `===` "
    "between any two.",
    DETAIL: "Write all of it again, as the description alone.",
    COMPLEX: "Write all of it again: one `Question:` block, a line `===`, and one `Answer:` block.",
}
_ASK_AGAIN = (
    "This cannot be used. The reason is: {reason} ({what}). {form} Say only what can be seen in the image itself."
)


@dataclass(frozen=True)
class Generated:
    """
    What `run_generate` did.

    Args:
        sampled: The rows.
        answered: First answers of this run.
        refused: How many answers were asked for once more, by the reason; and `mended`, how many are usable since.
        failed: Rows without an answer, by the kind of error, and the first message of each.
        usage: What this run used; `total` includes earlier runs.
        asked: How many rows this run had to ask for.
    """

    sampled: Sampled
    answered: int
    refused: dict[str, int]
    mended: int
    failed: dict[str, tuple[int, str]]
    usage: Usage
    total: Usage
    asked: int

    def __str__(self) -> str:
        if not self.asked:
            return f"{self.sampled}\nnothing to ask for: every row has its answer"
        lines = [f"{self.answered:,} rows answered; {usage_line(self.usage, self.total)}"]
        if self.refused:
            lines.append(f"asked once more for {sum(self.refused.values()):,} of them, {self.mended:,} usable since:")
            lines += [f"  {count:>7}  {reason}" for reason, count in self.refused.items()]
        for kind, (count, message) in self.failed.items():
            lines.append(f"  {count:>7}  failed, {kind}, such as: {message}")
        if self.failed:
            lines.append("failed rows are tried again by the next `minigpt4 instruct generate`")
        return "\n".join(lines)

    def check(self) -> None:
        """
        Raises:
            CurationError: if every row failed.
        """
        count = sum(count for count, _ in self.failed.values())
        if self.asked and count == self.asked:
            raise CurationError(f"all {count} rows failed, for the reasons above; the same command tries them again")


def again_digest(config: InstructConfig) -> str:
    """As [`answers_digest`], and with what is refused."""
    return settings_hash(AGAIN, VERSION, answers_digest(config))


def run_generate(
    project: InstructProject,
    config: InstructConfig,
    progress: bool = True,
    say: Callable[[str], object] = lambda line: None,
) -> Generated:
    """
    Chooses the rows, and has the model answer every one that has no answer with these settings yet.

    Each answer is on the disk, in the cache of answers, before its thread sends another request; results follow within
    a second or so. After a kill, the same call finds in the cache what was paid for.

    Args:
        project: Open.
        config: Its settings.
        progress: Whether to show bars on a terminal.
        say: Called with the estimate before the first request.

    Raises:
        CurationError: if no model is named, while another process runs a step, and as `sample_rows`.
        ChatError: for what affects every row: a refused key, nothing at the address, an exhausted budget. Finished
            work is kept.
        OSError, ValueError: for a source that cannot be read, or a local model that cannot be loaded.
    """
    settings = config.chat_settings()
    with project.writer(FIRST):
        sampled = sample_rows(project, config)
        spent = spent_before(project)
        expected = estimate((work.pair for work in first_works(project, config)), config)
        unchecked = sum(1 for _ in project.pending(AGAIN, again_digest(config))) if config.ask_again else 0
        if not expected.requests and not unchecked:
            return Generated(sampled, 0, {}, 0, {}, Usage(), spent, 0)
        if expected.requests:
            say(f"{sampled}\n{expected}")
        with open_chat_model(settings, project.folder / ANSWERS, spent) as model:
            run = _Run(project, config, model, expected.requests + unchecked)
            try:
                run.first(progress, expected.requests)
                if config.ask_again:
                    run.again(progress)
            except ChatError as error:
                run.close()
                left = sum(1 for _ in first_works(project, config))
                raise explained(error, "", CONFIG_FILE, run.answered, left) from error
            run.close()
            usage = model.usage
    failed = {kind: (count, run.errors[kind]) for kind, count in run.failed.most_common()}
    refused = dict(run.refused.most_common())
    return Generated(
        sampled, run.answered, refused, run.mended, failed, usage, spent + usage, expected.requests + unchecked
    )


class _Run:
    """One run: first answers, then second ones, with their counts."""

    def __init__(self, project: InstructProject, config: InstructConfig, model: ChatModel, requests: int) -> None:
        self.project, self.config, self.model = project, config, model
        self.answered = self.mended = 0
        self.refused, self.failed = Counter[str](), Counter[str]()
        self.errors: dict[str, str] = {}
        self._results: list[tuple[str, Result]] = []
        self._since = time.monotonic()
        longest = max((len(text.encode()) for text in self._texts()), default=0)
        # Asking again adds an answer.
        self._paid = PaidRun(project, model, requests, longest + CHARACTERS_PER_TOKEN * model.settings.max_tokens)

    def _texts(self) -> Iterator[str]:
        for pair in self.project.pairs():
            yield "".join(message["content"] for message in row_messages(pair, self.config))

    def first(self, progress: bool, total: int) -> None:
        """Asks for every row without an answer."""
        digest = answers_digest(self.config)
        requests = (
            (work, row_messages(work.pair, self.config)) for work in list(first_works(self.project, self.config))
        )
        with bar(FIRST, total, shown=progress) as done, self._writing():
            for work, answer in self.model.complete_many(requests):
                result = self._result(work, digest, answer)
                self.answered += result.outcome == OK
                self._keep(FIRST, result)
                done(1)

    def again(self, progress: bool) -> None:
        """Asks once more for every answer that cannot be used; the others pass on as they are."""
        digest = again_digest(self.config)
        cut = {pair.id for pair, result in self.project.current(FIRST) if result.details.get(CUT_OFF)}
        works = list(self.project.pending(AGAIN, digest))

        def requests() -> Iterator[tuple[tuple[Work, str], list[Message]]]:
            for work in works:
                kind = work.pair.origin["kind"]
                try:
                    read_answer(kind, work.text, self.config.language, work.pair.id in cut)
                except Refused as error:
                    self.refused[error.reason] += 1
                    form = _ASK_AGAIN.format(reason=error.reason, what=REASONS[error.reason], form=_FORMS[kind])
                    asked = row_messages(work.pair, self.config)
                    asked.append({"role": "assistant", "content": work.text})
                    yield (work, error.reason), [*asked, {"role": "user", "content": form}]
                else:
                    self._keep(AGAIN, Result(work.pair.id, digest, work.input, OK))
                    done(1)

        with bar("ask again", len(works), shown=progress) as done, self._writing():
            for (work, reason), answer in self.model.complete_many(requests()):
                result = self._result(work, digest, answer)
                if result.outcome == OK:
                    result = replace(result, reason=f"asked again: {reason}")
                    self.mended += _is_usable(work, result, self.config)
                self._keep(AGAIN, result)
                done(1)

    def _result(self, work: Work, digest: str, answer: ChatAnswer | ChatError) -> Result:
        """What one answer comes to; one that was cut off counts as answered, and is refused later."""
        cut_off = isinstance(answer, ChatError)
        if isinstance(answer, ChatError):
            if answer.answer is None or not answer.answer.text:
                self.failed[answer.kind] += 1
                self.errors.setdefault(answer.kind, str(answer))
                why = {"model": self.model.name, "error": str(answer)}
                return Result(work.pair.id, digest, work.input, FAILED, answer.kind, None, why)
            answer = answer.answer
        details = answer_details(self.model, answer)
        if cut_off:
            details[CUT_OFF] = True
        return Result(work.pair.id, digest, work.input, OK, text=answer.text, details=details)

    def _keep(self, step: str, result: Result) -> None:
        """Results are written some at a time: the cache of answers has each of them already."""
        self._results.append((step, result))
        if len(self._results) >= _TOGETHER or time.monotonic() - self._since > _SECONDS:
            self._write()

    def _write(self) -> None:
        results, self._results = self._results, []
        with self.project.transaction() as connection:
            for step in (FIRST, AGAIN):
                write_results(connection, step, [result for name, result in results if name == step])
            self._paid.write(connection)
        self._since = time.monotonic()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Writes what is left at the end, however it comes."""
        try:
            yield
        finally:
            self._write()

    def close(self) -> None:
        """Ends the run, see [`PaidRun`]."""
        self._paid.close()


def _is_usable(work: Work, result: Result, config: InstructConfig) -> bool:
    cut_off = bool(result.details.get(CUT_OFF))
    try:
        read_answer(work.pair.origin["kind"], result.text or "", config.language, cut_off)
    except Refused:
        return False
    return True
