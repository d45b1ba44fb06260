"""The filter step: applies the rules to every text, finds duplicates, and records new verdicts with their reasons."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError
from transformers_minigpt4.utils.files import JsonObject

from .config import CurationConfig
from .decisions import settle
from .duplicates import HASH_BYTES, near_duplicate_hash, similar_images, similar_texts
from .progress import bar
from .records import Pair, Result, text_hash
from .rules import RuleSet
from .store import AnyProject, Project


STEP = "filter"
KEPT, DROPPED = "kept", "dropped"
NO_IMAGE = "no_image"  # the reason if the image's file is missing or unreadable, whatever the rules
_TEXT_RULE, _IMAGE_RULE = "duplicate_text", "duplicate_image"
_BATCH = 5_000  # results written at a time; a run that is killed keeps them


@dataclass(frozen=True)
class FilterSummary:
    """
    The result of a run of the filter.

    Args:
        pairs: How many reach the filter.
        reasons: How many pairs each reason drops, the most common first; a pair counts for its first reason.
        written: How many verdicts are new or have changed; all others are kept as they were.
        no_image: Keys of pairs whose image is missing or unreadable.
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
            lines.append(f"no readable image: {', '.join(self.no_image[:5])}{' …' * (len(self.no_image) > 5)}")
        return "\n".join(lines)


def project_rules(config: CurationConfig) -> RuleSet:
    """The rules of a project: its changes to the defaults, and its prompts, which answers must not repeat."""
    return RuleSet(config.rules, (config.prompt, config.continue_prompt, config.repair_prompt))


def run_filter(project: Project, config: CurationConfig, progress: bool = True) -> FilterSummary:
    """
    Judges every pair that reaches the filter.

    Texts are judged one by one, if settings or text have changed since the last run. Duplicates depend on all pairs
    and are searched for in each run; of several similar pairs, the first is kept. Only new and changed verdicts are
    written, so that a changed rule affects nothing else: a pair that people have reviewed stays reviewed unless its
    verdict changes. If a text is again one that people have decided on, their decisions count again.

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
        written = write_verdicts(project, STEP, results, before)
        settle(project)
    dropped = Counter(result.reason for result in results if result.outcome == DROPPED)
    gone = [pair.key for pair, result in zip(pairs, results) if result.reason == NO_IMAGE]
    return FilterSummary(len(pairs), dict(dropped.most_common()), written, gone)


def _judge_texts(
    project: Project, rules: RuleSet, before: Mapping[int, Result], settings: str, progress: bool
) -> tuple[list[Pair], list[str], dict[int, JsonObject]]:
    """All pairs with their texts, and by place the details of those that a rule for single texts drops."""
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
    verdicts: dict[int, JsonObject],
    progress: bool,
) -> None:
    """Adds the verdicts that need the other pairs or the images, each among the pairs that are still kept."""
    for place, pair in enumerate(pairs):
        if place not in verdicts and not project.image_path(pair).is_file():
            verdicts[place] = {"reason": NO_IMAGE, "why": f"the file {pair.image} does not exist any more"}
    if (parameters := rules.parameters.get(_TEXT_RULE)) is not None:
        left = [place for place in range(len(pairs)) if place not in verdicts]
        found = similar_texts([texts[place] for place in left], **parameters)
        for number, duplicate in found.items():
            verdicts[left[number]] = {"reason": _TEXT_RULE, "why": duplicate.why, "of": pairs[left[duplicate.of]].key}
    if (parameters := rules.parameters.get(_IMAGE_RULE)) is not None:
        left = [place for place in range(len(pairs)) if place not in verdicts]
        hashes, errors = _image_hashes(project, [pairs[place] for place in left], progress)
        for place in left:
            if (error := errors.get(pairs[place].id)) is not None:
                verdicts[place] = {"reason": NO_IMAGE, "why": str(error)}
        left = [place for place in left if place not in verdicts]
        found = similar_images([hashes[pairs[place].id] for place in left], **parameters)
        for number, duplicate in found.items():
            of = pairs[left[duplicate.of]].key
            verdicts[left[number]] = {"reason": _IMAGE_RULE, "why": duplicate.why, "of": of}


def _image_hashes(
    project: Project, pairs: list[Pair], progress: bool
) -> tuple[dict[int, bytes], dict[int, ImageLoadError]]:
    """Near-duplicate hashes by pair id, each computed only once; and the errors of images that have none."""
    with project.transaction() as connection:
        # A cache, not part of the schema: its content can be computed again from the images.
        connection.execute(
            "CREATE TABLE IF NOT EXISTS image_hashes "
            "(pair_id INTEGER PRIMARY KEY REFERENCES pairs (id), hash BLOB NOT NULL)"
        )
    rows = project.connection().execute("SELECT pair_id, hash FROM image_hashes WHERE length(hash) = ?", (HASH_BYTES,))
    hashes: dict[int, bytes] = dict(rows.fetchall())
    errors: dict[int, ImageLoadError] = {}
    new = [pair for pair in pairs if pair.id not in hashes]
    with bar("images", len(new), shown=progress and bool(new)) as advance:
        for start in range(0, len(new), _BATCH):
            computed: dict[int, bytes] = {}
            for pair in new[start : start + _BATCH]:
                try:
                    computed[pair.id] = near_duplicate_hash(project.image_path(pair))
                except ImageLoadError as error:
                    errors[pair.id] = error
                advance(1)
            with project.transaction() as connection:
                connection.executemany("INSERT OR REPLACE INTO image_hashes VALUES (?, ?)", computed.items())
            hashes.update(computed)
    return hashes, errors


def _result(pair: Pair, settings: str, digest: str, verdict: JsonObject | None) -> Result:
    if verdict is None:
        return Result(pair.id, settings, digest, KEPT)
    details = {name: value for name, value in verdict.items() if name != "reason"}
    return Result(pair.id, settings, digest, DROPPED, verdict["reason"], details=details)


def write_verdicts(project: AnyProject, step: str, results: list[Result], before: Mapping[int, Result]) -> int:
    """Records new and changed results of a step; marks the others as valid for the current settings."""
    changed, same = [], []
    for result in results:
        known = before.get(result.pair_id)
        if known is None or replace(known, settings=result.settings, at="") != result:
            changed.append(result)
        elif known.settings != result.settings:
            same.append((result.settings, result.pair_id, step))
    for start in range(0, len(changed), _BATCH):
        project.record(step, changed[start : start + _BATCH])
    if same:
        with project.transaction() as connection:
            connection.executemany("UPDATE results SET settings = ? WHERE pair_id = ? AND step = ?", same)
    return len(changed)
