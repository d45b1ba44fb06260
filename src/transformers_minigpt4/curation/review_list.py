"""The list of pairs on the review's page: filtered by state, reason and text, some at a time."""

from collections import Counter
from dataclasses import dataclass

from transformers_minigpt4.web.html import person_name

from .database import fetch, incoming, plain_errors
from .decisions import DISAGREED, STEP
from .review import ReviewQueue, wants_two


TO_DO = "to do"
STATES = ("all", TO_DO, "accepted", "edited", "rejected")
ROWS = 25  # on one page of the list


@dataclass(frozen=True)
class ListedPair:
    """
    A pair in the list.

    Args:
        id: Of `records.Pair`.
        key: Its key.
        text: As people decided on it or wrote it.
        state: `"to do"` if the reviewer may still decide, else `"accepted"`, `"edited"` or `"rejected"`.
        reasons: Why it was rejected, and why the repair asked people to look closely.
    """

    id: int
    key: str
    text: str
    state: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """One page of the list: its rows, how many there are on all pages, its number from 1, and the last page's."""

    rows: list[ListedPair]
    found: int
    page: int
    pages: int


def list_pairs(
    queue: ReviewQueue, reviewer: str, state: str = "all", reason: str = "", search: str = "", page: int = 1
) -> Listing:
    """
    Lists pairs in the order of sampling.

    A pair that waits for the reviewer is shown without what others decided on it, so that two opinions stay two.

    Args:
        queue: The queue.
        reviewer: Whose list it is.
        state: One of [`STATES`].
        reason: One of [`all_reasons`], or `""` for all pairs.
        search: What key or text must contain, regardless of case; or a pair's number.
        page: From 1; another one is cut to what there is.

    Raises:
        ValueError: for an invalid name.
        CurationError: if the project's file cannot be read.
    """
    wanted = search.strip().casefold()
    found = [
        pair
        for pair in _pairs(queue, person_name(reviewer))
        if state in ("all", pair.state)
        and (not reason or reason in pair.reasons)
        and (not wanted or wanted == str(pair.id) or wanted in pair.key.casefold() or wanted in pair.text.casefold())
    ]
    pages = max(1, -(-len(found) // ROWS))
    page = min(max(1, page), pages)
    return Listing(found[(page - 1) * ROWS : page * ROWS], len(found), page, pages)


def all_reasons(queue: ReviewQueue) -> list[str]:
    """What pairs can be filtered by: the project's reasons to reject, then what else occurs, the most common first."""
    counts = Counter[str]()
    with plain_errors(queue.project.folder):
        connection = queue.project.connection()
        flagged = connection.execute("SELECT reason FROM results WHERE step = 'repair' AND outcome = 'flagged'")
        counts.update(reason for (joined,) in flagged for reason in joined.split(", "))
        counts.update(reason for (reason,) in connection.execute("SELECT reason FROM decisions WHERE reason != ''"))
    common = (reason for reason, _ in counts.most_common())
    return list(dict.fromkeys(filter(None, (*queue.project.config.review_reasons, *common, DISAGREED))))


def _pairs(queue: ReviewQueue, me: str) -> list[ListedPair]:
    project = queue.project
    share = project.config.review_twice
    query = f"""
        SELECT w.id, p.key, w.text, w.hash, r.outcome, r.reason, r.text AS edited,
            CASE WHEN f.outcome = 'flagged' THEN f.reason ELSE '' END AS flag
        FROM ({incoming(STEP, project.config.repairs)}) AS w JOIN pairs AS p ON p.id = w.id
        LEFT JOIN results AS r ON r.pair_id = w.id AND r.step = '{STEP}' AND r.input = w.hash
        LEFT JOIN results AS f ON f.pair_id = w.id AND f.step = 'repair' AND f.output = w.hash
        ORDER BY w.id"""
    with plain_errors(project.folder):
        connection = project.connection()
        rows = fetch(connection, query).fetchall()
        people: dict[tuple[int, str], set[str]] = {}
        for pair_id, text_id, name in connection.execute(
            "SELECT pair_id, input, reviewer FROM decisions WHERE undone IS NULL"
        ):
            people.setdefault((pair_id, text_id), set()).add(name)
    pairs = []
    for row in rows:
        names = people.get((row["id"], row["hash"]), set())
        reasons = row["flag"].split(", ")
        to_do = me not in names and len(names) < 1 + wants_two(row["key"], share)
        if not to_do:
            reasons.append(row["reason"])
        text = row["text"] if to_do or row["edited"] is None else row["edited"]
        state = TO_DO if to_do else row["outcome"] or TO_DO
        pairs.append(ListedPair(row["id"], row["key"], text, state, tuple(filter(None, reasons))))
    return pairs
