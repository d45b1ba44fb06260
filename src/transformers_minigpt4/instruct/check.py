"""The check: turns every answer into questions and answers, or refuses it with a reason, and finds near-duplicates."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from transformers_minigpt4.curation.config import settings_hash
from transformers_minigpt4.curation.decisions import settle
from transformers_minigpt4.curation.duplicates import similar_texts
from transformers_minigpt4.curation.filter import DROPPED, KEPT, STEP, write_verdicts
from transformers_minigpt4.curation.progress import bar
from transformers_minigpt4.curation.records import Pair, Result, text_hash
from transformers_minigpt4.curation.report import write_report

from .answers import DUPLICATE, REASONS, VERSION, Refused, Turn, read_answer, render_turns, with_question
from .config import InstructConfig
from .prompts import KINDS
from .store import InstructProject


@dataclass(frozen=True)
class Checked:
    """How many rows reached the check, were kept of each kind, and were refused for each reason; new verdicts."""

    rows: int
    kept: dict[str, int]
    reasons: dict[str, int]
    written: int

    def __str__(self) -> str:
        kept = sum(self.kept.values())
        share = f" ({kept / self.rows:.1%})" if self.rows else ""
        kinds = f": {', '.join(f'{count:,} {kind}' for kind, count in self.kept.items())}" if kept else ""
        lines = [f"check: {kept:,} of {self.rows:,} rows kept{share}{kinds}; {self.written:,} verdicts new or changed"]
        lines += [f"  {count:>7}  {reason}" for reason, count in self.reasons.items()]
        return "\n".join(lines)


def run_check(project: InstructProject, config: InstructConfig, progress: bool = True) -> Checked:
    """
    Judges every answer. Only new and changed verdicts are written, so that what people have reviewed stays reviewed.

    Args:
        project: Open.
        config: Its settings.
        progress: Whether to show a bar on a terminal.

    Raises:
        CurationError: while another process runs a step.
    """
    settings = settings_hash(STEP, VERSION, config.language, config.similarity, config.detail_questions, config.seed)
    with project.writer("check"):
        before = {result.pair_id: result for _, result in project.current(STEP)}
        results: list[Result] = []
        kept: list[tuple[Pair, list[Turn]]] = []
        with bar("check", None, shown=progress) as advance:
            for pair, text, cut_off in project.answers():
                try:
                    turns = read_answer(pair.origin["kind"], text, config.language, cut_off)
                except Refused as error:
                    why = {"why": error.why}
                    results.append(Result(pair.id, settings, text_hash(text), DROPPED, error.reason, None, why))
                else:
                    turns = with_question(turns, config.detail_questions, f"{config.seed}/{pair.key}")
                    results.append(Result(pair.id, settings, text_hash(text), KEPT, text=render_turns(turns)))
                    kept.append((pair, turns))
                advance(1)
        duplicates = _duplicates(kept, config.similarity)
        results = [_refused(result, duplicates.get(result.pair_id)) for result in results]
        written = write_verdicts(project, STEP, results, before)
        settle(project)
    kinds = Counter(pair.origin["kind"] for pair, _ in kept if pair.id not in duplicates)
    reasons = Counter(result.reason for result in results if result.outcome == DROPPED)
    ordered = {kind: kinds[kind] for kind in KINDS if kinds[kind]}
    return Checked(len(results), ordered, dict(reasons.most_common()), written)


def write_page(project: InstructProject, config: InstructConfig) -> Path:
    """Writes the report: counts, reasons, lengths, and samples of what was kept and refused, all escaped."""
    model = config.chat.model if config.chat is not None else "no model"
    made = f"Captions {config.captions}, boxes {config.instances or 'of the same file, if any'}, written by {model}."
    return write_report(project, "Instruction data", made, REASONS)


def _duplicates(kept: list[tuple[Pair, list[Turn]]], similarity: float) -> dict[int, dict[str, str]]:
    """By pair, what it is similar to; of several similar rows of a kind, the first is kept."""
    found: dict[int, dict[str, str]] = {}
    if not similarity:
        return found
    for kind in KINDS:
        rows = [(pair, turns) for pair, turns in kept if pair.origin["kind"] == kind]
        # Without the questions of descriptions, which are drawn from a list.
        texts = [
            " ".join(turn.answer if len(turns) == 1 else f"{turn.question} {turn.answer}" for turn in turns)
            for _, turns in rows
        ]
        for place, duplicate in similar_texts(texts, similarity).items():
            found[rows[place][0].id] = {"why": duplicate.why, "of": rows[duplicate.of][0].key}
    return found


def _refused(result: Result, duplicate: dict[str, str] | None) -> Result:
    if duplicate is None:
        return result
    return Result(result.pair_id, result.settings, result.input, DROPPED, DUPLICATE, None, dict(duplicate))
