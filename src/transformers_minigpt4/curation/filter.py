"""The filter step: applies the rules to every text, finds duplicates, and records what changed, with its reason."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError

from .config import CurationConfig
from .decisions import settle
from .duplicates import HASH_BYTES, near_duplicate_hash, similar_images, similar_texts
from .progress import bar
from .records import Pair, Result, text_hash
from .rules import RuleSet
from .store import Project


STEP = "filter"
KEPT, DROPPED = "kept", "dropped"
NO_IMAGE = "no_image"  # the reason where the picture's file is gone or cannot be read; no rule can be asked then
_TEXT_RULE, _IMAGE_RULE = "duplicate_text", "duplicate_picture"
_BATCH = 5_000  # results written at a time: a run that is killed keeps these


@dataclass(frozen=True)
class FilterSummary:
    """
    What a run of the filter did.

    Args:
        pairs: How many reach the filter.
        reasons: How many pairs each reason drops, the commonest first; a pair counts for its first reason.
        written: Verdicts that are new or have changed; all others stand in the project as they were.
        no_picture: Keys of pairs whose picture is gone or cannot be read.
    """

    pairs: int
    reasons: dict[str, int]
    written: int
    no_image: list[str]

    @property
    def kept(self) -> int:
        return self.pairs - sum(self.reasons.values())

    def __str__(self) -> str:
        share = f" ({self.kept / self.pairs:.1%})" if self.pairs else ""
        lines = [f"filter: {self.kept} of {self.pairs} pairs kept{share}, {self.written} verdicts new or changed"]
        lines += [f"  {count:>7}  {reason}" for reason, count in self.reasons.items()]
        if self.no_image:
            lines.append(f"no readable picture: {', '.join(self.no_image[:5])}{' …' * (len(self.no_image) > 5)}")
        return "\n".join(lines)


def project_rules(config: CurationConfig) -> RuleSet:
    """The rules of a project: its changes to the defaults, and its prompts as what must not be left in an answer."""
    return RuleSet(config.rules, (config.prompt, config.continue_prompt, config.repair_prompt))


def run_filter(project: Project, config: CurationConfig, progress: bool = True) -> FilterSummary:
    """
    Judges every pair that reaches the filter.

    Texts are judged one by one, where settings or text have changed since the last run. Duplicates are a matter of all
    pairs and are looked for at each run; of several alike the first drawn is kept. Only new and changed verdicts are
    written, so that a changed rule touches what it affects and no more: a pair that people have reviewed stays
    reviewed unless its verdict turns. Where a text is what people decided on before, their decisions count again.

    Args:
        project: Open.
        config: Its settings.
        progress: Whether to show a bar on a terminal.

    Raises:
        CurationError: for rules that do not exist or cannot work, or while another process runs a step.
    """
    rules = project_rules(config)
    with project.writer(STEP):
        settings = rules.digest()
        before = {result.pair_id: result for _, result in project.current(STEP)}
        pairs, texts, verdicts = _judge_texts(project, rules, before, settings, progress)
        _judge_together(project, rules, pairs, texts, verdicts, progress)
        results = [
            _result(pair, settings, text_hash(text), verdicts.get(place))
            for place, (pair, text) in enumerate(zip(pairs, texts))
        ]
        written = _write(project, results, before)
        settle(project)
    dropped = Counter(result.reason for result in results if result.outcome == DROPPED)
    gone = [pair.key for pair, result in zip(pairs, results) if result.reason == NO_IMAGE]
    return FilterSummary(len(pairs), dict(dropped.most_common()), written, gone)


def _judge_texts(
    project: Project, rules: RuleSet, before: Mapping[int, Result], settings: str, progress: bool
) -> tuple[list[Pair], list[str], dict[int, dict[str, Any]]]:
    """All pairs with their texts, and by place the details of those that a rule on single texts drops."""
    pairs, texts, verdicts = [], [], {}
    together = {_TEXT_RULE, _IMAGE_RULE, NO_IMAGE}
    with bar(STEP, None, shown=progress) as advance:
        for place, (pair, text) in enumerate(project.texts(STEP)):
            pairs.append(pair)
            texts.append(text)
            known = before.get(pair.id)
            if known is not None and known.settings == settings:
                if known.outcome == DROPPED and known.reason not in together:
                    verdicts[place] = {"reason": known.reason, **known.details}
            elif found := rules.check(text):
                (reason, why), *others = found
                verdicts[place] = {"reason": reason, "why": why}
                if others:
                    verdicts[place]["also"] = dict(others)
            advance(1)
    return pairs, texts, verdicts


def _judge_together(
    project: Project,
    rules: RuleSet,
    pairs: list[Pair],
    texts: list[str],
    verdicts: dict[int, dict[str, Any]],
    progress: bool,
) -> None:
    """Adds what needs the other pairs or the pictures, each among those that are still kept."""
    for place, pair in enumerate(pairs):
        if place not in verdicts and not project.image_path(pair).is_file():
            verdicts[place] = {"reason": NO_IMAGE, "why": f"there is no file {pair.image} any more"}
    if (parameters := rules.parameters.get(_TEXT_RULE)) is not None:
        left = [place for place in range(len(pairs)) if place not in verdicts]
        found = similar_texts([texts[place] for place in left], **parameters)
        for number, duplicate in found.items():
            verdicts[left[number]] = {"reason": _TEXT_RULE, "why": duplicate.why, "of": pairs[left[duplicate.of]].key}
    if (parameters := rules.parameters.get(_IMAGE_RULE)) is not None:
        left = [place for place in range(len(pairs)) if place not in verdicts]
        prints = dict(_prints(project, [pairs[place] for place in left], progress))
        for place in left:
            if isinstance(error := prints[pairs[place].id], ImageLoadError):
                verdicts[place] = {"reason": NO_IMAGE, "why": str(error)}
        left = [place for place in left if place not in verdicts]
        found = similar_images([prints[pairs[place].id] for place in left], **parameters)  # type: ignore[misc]
        for number, duplicate in found.items():
            of = pairs[left[duplicate.of]].key
            verdicts[left[number]] = {"reason": _IMAGE_RULE, "why": duplicate.why, "of": of}


def _prints(project: Project, pairs: list[Pair], progress: bool) -> Iterator[tuple[int, bytes | ImageLoadError]]:
    """Each pair's id with its picture's print, or with what is wrong with the picture. A print is made once."""
    with project.transaction() as connection:
        # A cache beside the tables of the schema: what it holds can be made again from the pictures.
        connection.execute(
            "CREATE TABLE IF NOT EXISTS picture_prints "
            "(pair_id INTEGER PRIMARY KEY REFERENCES pairs (id), print BLOB NOT NULL)"
        )
    rows = project.connection().execute(
        "SELECT pair_id, print FROM picture_prints WHERE length(print) = ?", (HASH_BYTES,)
    )
    known = dict(rows.fetchall())
    new = [pair for pair in pairs if pair.id not in known]
    with bar("images", len(new), shown=progress and bool(new)) as advance:
        for start in range(0, len(new), _BATCH):
            made: dict[int, bytes] = {}
            for pair in new[start : start + _BATCH]:
                try:
                    made[pair.id] = near_duplicate_hash(project.image_path(pair))
                except ImageLoadError as error:
                    yield pair.id, error
                advance(1)
            with project.transaction() as connection:
                connection.executemany("INSERT OR REPLACE INTO picture_prints VALUES (?, ?)", made.items())
            known.update(made)
    yield from ((pair.id, known[pair.id]) for pair in pairs if pair.id in known)


def _result(pair: Pair, settings: str, digest: str, verdict: dict[str, Any] | None) -> Result:
    if verdict is None:
        return Result(pair.id, settings, digest, KEPT)
    details = {name: value for name, value in verdict.items() if name != "reason"}
    return Result(pair.id, settings, digest, DROPPED, verdict["reason"], details=details)


def _write(project: Project, results: list[Result], before: Mapping[int, Result]) -> int:
    """Records new and changed verdicts; of the others notes that they hold under the settings of now."""
    changed, same = [], []
    for result in results:
        known = before.get(result.pair_id)
        if known is None or replace(known, settings=result.settings, at="") != result:
            changed.append(result)
        elif known.settings != result.settings:
            same.append((result.settings, result.pair_id, STEP))
    for start in range(0, len(changed), _BATCH):
        project.record(STEP, changed[start : start + _BATCH])
    if same:
        with project.transaction() as connection:
            connection.executemany("UPDATE results SET settings = ? WHERE pair_id = ? AND step = ?", same)
    return len(changed)
