"""What is to be asked: the conversation of each row, which rows wait for an answer, and what that will take."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from transformers_minigpt4.curation.config import settings_hash
from transformers_minigpt4.curation.records import Pair, Work
from transformers_minigpt4.llm.types import Message

from .answers import CUT_OFF
from .config import CONFIG_FILE, InstructConfig
from .prompts import PROMPTS, example_lengths, messages
from .sampling import Row, choose_rows, left_out, row_pair
from .store import InstructProject


FIRST = "generate"  # name of the step in the history
CHARACTERS_PER_TOKEN = 4  # of English, for estimates


@dataclass(frozen=True)
class Estimate:
    """
    What asking once for each of some rows takes.

    Token counts are estimates: four characters a token, and answers as long as those of the examples; `most` is the
    cost if every answer were as long as it may be.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    most: float | None

    def __str__(self) -> str:
        text = (
            f"{self.requests:,} requests, about {self.prompt_tokens:,} tokens in and {self.completion_tokens:,} out "
            f"({self.prompt_tokens + self.completion_tokens:,} in all)"
        )
        if self.cost is None or self.most is None:
            return f"{text}; set price_in and price_out in {CONFIG_FILE} for the cost"
        return f"{text}, cost about {self.cost:.2f}, at most {self.most:.2f}; asking again is not included"


@dataclass(frozen=True)
class Plan:
    """What `generate` would do: the first conversations with their rows' keys, what all take, rows in words."""

    requests: list[tuple[str, list[Message]]]
    estimate: Estimate
    summary: str


def row_messages(pair: Pair, config: InstructConfig) -> list[Message]:
    """The conversation that asks for a row."""
    origin = pair.origin
    return messages(origin["kind"], origin["captions"], origin["boxes"], config.language)


def answers_digest(config: InstructConfig) -> str:
    """
    Changes with what decides an answer: model, temperature, language, prompts. Not with the endpoint's address.
    """
    settings = config.chat_settings()
    prompts = [path.read_text(encoding="utf-8") for path in sorted(PROMPTS.glob("*/*.txt"))]
    return settings_hash(FIRST, settings.model, settings.temperature, config.language, prompts)


def first_works(project: InstructProject, config: InstructConfig) -> Iterator[Work]:
    """What has no answer yet, and what was cut off if longer answers are allowed now."""
    digest, longest = answers_digest(config), config.chat_settings().max_tokens
    short = [
        Work(pair, "", result.input)
        for pair, result in project.current(FIRST)
        if result.settings == digest and result.details.get(CUT_OFF) and result.details["max_tokens"] < longest
    ]
    yield from project.pending(FIRST, digest)
    yield from short


def estimate(pairs: Iterable[Pair], config: InstructConfig) -> Estimate:
    """What asking once for each of these rows would take."""
    settings = config.chat_settings()
    kinds = Counter[str]()
    characters = 0
    for pair in pairs:
        kinds[pair.origin["kind"]] += 1
        characters += sum(len(message["content"]) for message in row_messages(pair, config))
    answer = 0
    for kind, count in kinds.items():
        lengths = example_lengths(kind)
        mean = sum(lengths) / len(lengths) / CHARACTERS_PER_TOKEN
        answer += round(count * min(mean, settings.max_tokens))
    requests, prompt = kinds.total(), round(characters / CHARACTERS_PER_TOKEN)
    if settings.price_in is None or settings.price_out is None:
        return Estimate(requests, prompt, answer, None, None)
    most = settings.cost(prompt, requests * settings.max_tokens)
    return Estimate(requests, prompt, answer, settings.cost(prompt, answer), most)


def read_plan(folder: Path, limit: int | None = None, shown: int = 3) -> Plan:
    """
    What the next `generate` would ask for. Nothing is written.

    Args:
        folder: Of the project.
        limit: In place of the setting.
        shown: Conversations to return.

    Raises:
        CurationError: for a project, or a source, that cannot be used.
        OSError, ValueError: for a source that cannot be read.
    """
    project = InstructProject(folder)
    config = project.config if limit is None else replace(project.config, limit=limit)
    pairs: list[Pair] = []
    known: set[str] = set()
    if project.database.exists():
        with InstructProject.open(folder) as project:
            known = {str(pair.origin["key"]) for pair in project.pairs()}
            pairs = [work.pair for work in first_works(project, config)]
    skipped = Counter[str]()
    if config.limit is None or len(known) < config.limit:
        rows, bad = choose_rows(config)
        pairs += [_pair(row) for row in rows if row.key not in known]
        skipped.update(row.kind for row in bad)
    return Plan(
        [(pair.key, row_messages(pair, config)) for pair in islice(pairs, shown)],
        estimate(pairs, config),
        f"{len(pairs):,} rows wait for an answer{left_out(skipped)}",
    )


def _pair(row: Row) -> Pair:
    key, image, digest, origin = row_pair(row)
    return Pair(0, key, image, digest, "", origin, "")
