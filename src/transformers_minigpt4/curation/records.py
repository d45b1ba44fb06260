"""What a curation project holds: its steps, pairs of image and text, the steps' results, and counts of them."""

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime

from transformers_minigpt4.utils.files import JsonObject


IMAGES = "images"  # folder of the images below the project's folder
STEPS = ("generate", "repair", "filter", "review")
# Outcomes whose text the next step takes. Failed pairs wait for the next run of the step that failed.
PASSING = {
    "generate": ("ok",),
    "repair": ("ok", "flagged"),
    "filter": ("kept",),
    "review": ("accepted", "edited"),
}
FAILED = "failed"


@dataclass(frozen=True)
class Pair:
    """
    One image of the project.

    `key` names its file and, later, its row of the dataset; `image` is the path of the copy of its bytes, below the
    project's folder; `origin` holds what the source said of it: `key`, and texts such as `caption`.
    """

    id: int
    key: str
    image: str
    sha256: str
    source: str
    origin: JsonObject
    sampled_at: str


@dataclass(frozen=True)
class Work:
    """A pair that a step has to look at, with the text of the step before (`""` for `generate`) and its digest."""

    pair: Pair
    text: str
    input: str


@dataclass(frozen=True)
class Result:
    """
    The outcome of a step for a pair.

    Args:
        pair_id: Of `Pair`.
        settings: Digest of what the step depends on (`config.settings_hash`).
        input: `Work.input`.
        outcome: `ok` or `failed` (generate); `ok`, `flagged` or `failed` (repair); `kept` or `dropped` (filter);
            `accepted`, `edited` or `rejected` (review).
        reason: A few words that are counted, such as a rule's name; may be empty.
        text: The step's text, or `None` where it passes on what it read.
        details: Whatever else the step wants to keep, as JSON values.
        at: When; filled in by `record`.
    """

    pair_id: int
    settings: str
    input: str
    outcome: str
    reason: str = ""
    text: str | None = None
    details: JsonObject = field(default_factory=dict)
    at: str = ""


@dataclass(frozen=True)
class StepCount:
    """
    How many pairs reached a step, and their outcomes.

    `reached` = the sum of `outcomes` + `waiting`; pairs whose text has changed since the step last saw them wait.
    `reasons` counts by outcome and reason, empty reasons left out.
    """

    step: str
    reached: int
    outcomes: dict[str, int]
    reasons: dict[str, dict[str, int]]
    waiting: int


@dataclass(frozen=True)
class Funnel:
    """The counts of a project: images wanted, sampled and skipped (by kind), then each step, then accepted pairs."""

    wanted: int
    sampled: int
    skipped: dict[str, int]
    steps: list[StepCount]
    accepted: int


def text_hash(text: str) -> str:
    """The digest by which steps see whether a text has changed."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def now() -> str:
    """The current time as in the tables: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
