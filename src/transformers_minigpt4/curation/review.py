"""
Hands pairs to people and keeps what they decide: the queue behind the page and the files of `minigpt4 curate review`.

How it works, for whoever reviews or builds upon it:

- A pair is due while its text, as the filter passed it on, has fewer decisions than it wants: one, or two for a share
  of the pairs that is drawn by their keys (`review_twice`). Decisions on a text that has changed since do not count,
  so the pair is asked again. A pair never comes twice to one person with one text.
- The pair that somebody looks at is claimed for `CLAIM_SECONDS`; nobody else gets it. A claim is about who looks, not
  about who may decide: a decision that comes late is kept like any other.
- Each decision is a row of its own, on the disk before [`ReviewQueue.decide`] returns; undoing it marks the row.
- Two people who disagree: the stricter decision counts (reject, then edit, then accept), and of two edits the later.
"""

import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from time import time
from typing import Any, Literal

from transformers_minigpt4.web.html import person_name

from .config import CurationError
from .database import erase_result, incoming, plain_errors, write_results
from .records import IMAGES, Result, now
from .store import Project


Action = Literal["accepted", "edited", "rejected"]
ACTIONS: tuple[Action, ...] = ("accepted", "edited", "rejected")  # from the mildest to the strictest
CLAIM_SECONDS = 900.0
DISAGREED = "reviewers disagreed"
_STEP = "review"
_SETTINGS = ""  # people have none


@dataclass(frozen=True)
class ReviewPair:
    """
    A pair as a reviewer sees it.

    Args:
        id: Of `store.Pair`.
        key: Its key.
        picture: Path of its picture below the project's folder.
        before: The text as the model wrote it.
        after: The text to decide on.
        text_id: Digest of `after`.
        flag: Why the repair wants people to look closely; mostly empty.
        again: Whether the reviewer decided on another text of this pair before.
    """

    id: int
    key: str
    image: str
    before: str
    after: str
    text_id: str
    flag: str
    again: bool


@dataclass(frozen=True)
class Progress:
    """
    Counts over the pairs that the filter kept.

    `left` is what the asking reviewer can still be shown, whoever looks at it now; `twice` and `twice_done` are the
    pairs that want two reviewers and those that had them; `missing` are due, but their picture is gone.
    """

    pairs: int
    accepted: int
    edited: int
    rejected: int
    mine: int
    left: int
    twice: int
    twice_done: int
    missing: int

    @property
    def decided(self) -> int:
        return self.accepted + self.edited + self.rejected


@dataclass(frozen=True)
class Agreement:
    """
    How well two people agree on the same texts.

    Args:
        pairs: Texts that two people decided on; of more decisions, the first two.
        agreed: Those where both took the same of `ACTIONS`.
        raw: Their share, or `None` without such pairs.
        kappa: Cohen's kappa between first and second decisions; `None` where chance alone would always agree.
    """

    pairs: int
    agreed: int
    raw: float | None
    kappa: float | None


def wants_two(key: str, share: float) -> bool:
    """Whether a pair belongs to the `share` (0 to 1) that two people see; drawn by its key, so it stays the same."""
    return _draw(key) < share


@lru_cache(maxsize=1 << 17)
def _draw(key: str) -> float:
    return int.from_bytes(sha256(key.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


class ReviewQueue:
    """
    The pairs of a project in the order of drawing, for any number of reviewers, threads and processes at once.

    Args:
        project: The project; it is not closed here.
        claim_seconds: How long a pair stays with who looks at it.

    Reviewers are named as [`person_name`] spells them.
    """

    def __init__(self, project: Project, claim_seconds: float = CLAIM_SECONDS) -> None:
        self.project, self.claim_seconds = project, claim_seconds
        self._incoming = incoming(_STEP, project.config.repairs)
        self._known: dict[int, tuple[str, bool]] = {}
        settle(project)

    def next(self, reviewer: str) -> ReviewPair | None:
        """
        The pair that the reviewer is looking at, or else the next one, which is then claimed.

        Pairs whose picture is gone are passed over; [`progress`] counts them.

        Raises:
            ValueError: for a name that is none.
            CurationError: if the project's file cannot be written.
        """
        me = person_name(reviewer)
        with self.project.transaction() as connection:
            row = self._first(connection, f"{_DUE} AND p.id IN (SELECT pair_id FROM claims WHERE reviewer = :me)", me)
            row = row or self._first(connection, f"{_DUE} AND (c.reviewer IS NULL OR c.until < :now)", me)
            connection.execute("DELETE FROM claims WHERE reviewer = ?", (me,))
            if row is None:
                return None
            self._claim(connection, row["id"], me)
        return self._pair(row)

    def decide(self, reviewer: str, pair_id: int, text_id: str, action: str, text: str | None = None) -> str:
        """
        Keeps a decision; it is on the disk when this returns.

        Args:
            reviewer: Who decided.
            pair_id: `ReviewPair.id`.
            text_id: `ReviewPair.text_id`, so that a decision on a text that has changed meanwhile is known as such.
            action: One of `ACTIONS`.
            text: For `"edited"`, the new text. One that equals the old text makes the decision `"accepted"`.

        Returns:
            What the reviewer should know, mostly nothing: that there is a decision of theirs on this text already,
            which stays; or that the text has changed and will come again.

        Raises:
            ValueError: for a name, pair or action that is none, and for an edit without text.
            CurationError: if the project's file cannot be written.
        """
        me = person_name(reviewer)
        check_action(action, text)
        with self.project.transaction() as connection:
            known = connection.execute("SELECT 1 FROM pairs WHERE id = ?", (pair_id,)).fetchone()
            if known is None:
                raise CurationError(f"there is no pair {pair_id} in this project; reload the page")
            earlier = live_decision(connection, pair_id, me, text_id)
            if earlier is not None:
                return f"You {earlier['action']} this pair before; undo that first to decide anew."
            current = self.current(connection, pair_id)
            add_decision(connection, pair_id, me, text_id, action, text, current)
            connection.execute("DELETE FROM claims WHERE reviewer = ?", (me,))
        if current is None:
            return "The filter has dropped this pair meanwhile; your decision is kept and counts if it comes back."
        if current["text_id"] != text_id:
            return "The text changed while you looked at it. Your decision is kept; the new text will come to you."
        return ""

    def undo(self, reviewer: str) -> tuple[ReviewPair | None, str]:
        """
        Takes the reviewer's last decision back and gives the pair again.

        Returns:
            The pair, or `None` where it cannot be shown; and what the reviewer should know.

        Raises:
            ValueError: for a name that is none.
            CurationError: if the project's file cannot be written.
        """
        me = person_name(reviewer)
        with self.project.transaction() as connection:
            mine = "SELECT * FROM decisions WHERE reviewer = ? AND undone IS NULL ORDER BY id DESC LIMIT 1"
            last = _one(connection, mine, (me,))
            if last is None:
                return None, "There is nothing to undo."
            take_back(connection, last)
            current = self.current(connection, last["pair_id"], me)
            if current is None:
                return None, "Undone. The filter has dropped that pair meanwhile, so it does not come again."
            if not (self.project.folder / current["image"]).is_file():
                return None, f"Undone. The picture of {current['key']} is gone, so it cannot be shown."
            connection.execute("DELETE FROM claims WHERE reviewer = ? OR until < ?", (me, time()))
            self._claim(connection, current["id"], me)
        return self._pair(current), f"Undone: you had {last['action']} this pair."

    def progress(self, reviewer: str | None = None) -> Progress:
        """The counts, `mine` and `left` for one reviewer (0 and 0 without)."""
        me = person_name(reviewer) if reviewer is not None else ""
        counts = dict.fromkeys(("accepted", "edited", "rejected", "mine", "left", "twice", "twice_done", "missing"), 0)
        names: dict[int, set[str]] = {}
        with plain_errors(self.project.folder):
            connection = self.project.connection()
            text_ids = dict(connection.execute(f"SELECT id, hash FROM ({self._incoming})").fetchall())
            results = connection.execute("SELECT pair_id, input, outcome FROM results WHERE step = ?", (_STEP,))
            for pair_id, text_id, outcome in results:
                if text_ids.get(pair_id) == text_id:
                    counts[outcome] += 1
            decisions = connection.execute("SELECT pair_id, input, reviewer FROM decisions WHERE undone IS NULL")
            for pair_id, text_id, name in decisions:
                if text_ids.get(pair_id) == text_id:
                    names.setdefault(pair_id, set()).add(name)
            there, known = _names(self.project), self._known_pairs(connection)
        for pair_id in text_ids:
            (image, two), who = known[pair_id], names.get(pair_id, ())
            counts["mine"] += me in who
            counts["twice"] += two
            counts["twice_done"] += two and len(who) >= 2
            if len(who) < 1 + two:
                gone = image not in there
                counts["missing"] += gone
                counts["left"] += bool(me) and me not in who and not gone
        return Progress(pairs=len(text_ids), **counts)

    def _known_pairs(self, connection: sqlite3.Connection) -> dict[int, tuple[str, bool]]:
        """Each pair's picture and whether it wants two reviewers; neither ever changes, so only new pairs are read."""
        known, share = self._known, self.project.config.review_twice
        rows = connection.execute("SELECT id, image, key FROM pairs WHERE id > ?", (max(known, default=0),))
        if new := {pair_id: (image, wants_two(key, share)) for pair_id, image, key in rows}:
            known = self._known = known | new  # another dict: other threads may be reading the old one
        return known

    def agreement(self) -> Agreement:
        """Over all texts that two people decided on, those that have changed since included."""
        first_two: dict[tuple[int, str], list[str]] = {}
        with plain_errors(self.project.folder):
            rows = self.project.connection().execute(
                "SELECT pair_id, input, action FROM decisions WHERE undone IS NULL AND (pair_id, input) IN "
                "(SELECT pair_id, input FROM decisions WHERE undone IS NULL GROUP BY 1, 2 HAVING count(*) > 1) "
                "ORDER BY id"
            )
            for pair_id, text_id, action in rows:
                first_two.setdefault((pair_id, text_id), []).append(action)
        return measure_agreement([(own[0], own[1]) for own in first_two.values()])

    def due(self, reviewer: str | None = None) -> tuple[list[ReviewPair], list[str]]:
        """
        All pairs that want a decision (of this reviewer, if named), claimed or not.

        Returns:
            The pairs, and the keys of those whose picture is gone.
        """
        me = person_name(reviewer) if reviewer is not None else ""
        with plain_errors(self.project.folder):
            rows = self._rows(self.project.connection(), _DUE, me).fetchall()
        there = _names(self.project)
        pairs = [self._pair(row) for row in rows if row["image"] in there]
        return pairs, [row["key"] for row in rows if row["image"] not in there]

    def current(self, connection: sqlite3.Connection, pair_id: int, reviewer: str = "") -> sqlite3.Row | None:
        """A pair as it reaches the review now, or `None` where it does not."""
        return _one(connection, f"{self._select()} WHERE p.id = :pair", {"pair": pair_id, "me": reviewer})

    def _select(self) -> str:
        """
        The pairs that reach the review, with the columns of `ReviewPair`; `:me` is the reviewer.

        With CROSS JOIN and `+p.id` SQLite goes through the pairs in their order and stops at the first asked for.
        """
        return f"""
            SELECT w.id, p.key, p.image, coalesce(g.text, '') AS before, w.text AS after, w.hash AS text_id,
                CASE WHEN f.outcome = 'flagged' THEN f.reason ELSE '' END AS flag,
                EXISTS (SELECT 1 FROM decisions AS d WHERE d.pair_id = w.id AND d.reviewer = :me
                    AND d.input != w.hash AND d.undone IS NULL) AS again
            FROM pairs AS p CROSS JOIN ({self._incoming}) AS w ON w.id = +p.id
            LEFT JOIN results AS g ON g.pair_id = w.id AND g.step = 'generate'
            LEFT JOIN results AS f ON f.pair_id = w.id AND f.step = 'repair' AND f.output = w.hash
            LEFT JOIN claims AS c ON c.pair_id = w.id"""

    def _rows(self, connection: sqlite3.Connection, where: str, me: str) -> sqlite3.Cursor:
        share = self.project.config.review_twice
        connection.create_function("wanted", 1, lambda key: 1 + wants_two(key, share), deterministic=True)
        cursor = connection.cursor()
        cursor.row_factory = sqlite3.Row  # type: ignore[assignment]
        return cursor.execute(f"{self._select()} WHERE {where} ORDER BY p.id", {"me": me, "now": time()})

    def _first(self, connection: sqlite3.Connection, where: str, me: str) -> sqlite3.Row | None:
        """The first such pair that has its picture."""
        for row in self._rows(connection, where, me):
            if (self.project.folder / row["image"]).is_file():
                return row
        return None

    def _claim(self, connection: sqlite3.Connection, pair_id: int, me: str) -> None:
        # Whoever undoes may find another at the pair, who then keeps the claim: both may decide.
        connection.execute(
            "INSERT INTO claims VALUES (:pair, :me, :until) ON CONFLICT (pair_id) DO UPDATE "
            "SET reviewer = :me, until = :until WHERE until < :now",
            {"pair": pair_id, "me": me, "until": time() + self.claim_seconds, "now": time()},
        )

    @staticmethod
    def _pair(row: sqlite3.Row) -> ReviewPair:
        return ReviewPair(**{**dict(row), "again": bool(row["again"])})


# Wants a decision, and not one that `:me` has made. `w`, `p` and `c` as in `ReviewQueue._select`.
_DUE = """
    (SELECT count(DISTINCT d.reviewer) FROM decisions AS d
     WHERE d.pair_id = w.id AND d.input = w.hash AND d.undone IS NULL) < wanted(p.key)
    AND NOT EXISTS (SELECT 1 FROM decisions AS d
     WHERE d.pair_id = w.id AND d.reviewer = :me AND d.input = w.hash AND d.undone IS NULL)"""


def settle(project: Project) -> int:
    """
    Gives pairs their review result where the decisions are there and the result is not.

    So it is when a text returns to what it was when people decided on it: a rule was changed and changed back.

    Returns:
        How many pairs it concerned.
    """
    query = f"""
        SELECT w.id, w.hash FROM ({incoming(_STEP, project.config.repairs)}) AS w
        LEFT JOIN results AS r ON r.pair_id = w.id AND r.step = '{_STEP}' AND r.input = w.hash
        WHERE r.pair_id IS NULL AND EXISTS (SELECT 1 FROM decisions AS d
            WHERE d.pair_id = w.id AND d.input = w.hash AND d.undone IS NULL)"""
    with project.transaction() as connection:
        rows = connection.execute(query).fetchall()
        for pair_id, text_id in rows:
            _write_verdict(connection, pair_id, text_id)
    return len(rows)


def check_action(action: str, text: str | None) -> None:
    """
    Raises:
        CurationError: for an action that is none, and for an edit without text.
    """
    if action not in ACTIONS:
        raise CurationError(f"{action!r} is no action; it is one of {', '.join(ACTIONS)}")
    if action == "edited" and not (text or "").strip():
        raise CurationError("an edited pair needs its text; reject the pair if nothing of the text can stay")


def same_text(text: str, other: str) -> bool:
    """Whether texts differ in nothing but white space at the ends and the kind of line ends, which browsers change."""
    return _plain(text) == _plain(other)


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def live_decision(connection: sqlite3.Connection, pair_id: int, reviewer: str, text_id: str) -> sqlite3.Row | None:
    """What this reviewer decided on this text and has not undone."""
    return _one(
        connection,
        "SELECT * FROM decisions WHERE pair_id = ? AND reviewer = ? AND input = ? AND undone IS NULL",
        (pair_id, reviewer, text_id),
    )


def add_decision(
    connection: sqlite3.Connection,
    pair_id: int,
    reviewer: str,
    text_id: str,
    action: str,
    text: str | None,
    current: sqlite3.Row | None,
) -> None:
    """Writes a decision within the caller's transaction, and the pair's verdict if it is on the `current` text."""
    if action == "edited" and current is not None and current["text_id"] == text_id:
        action = "accepted" if same_text(text or "", current["after"]) else action
    connection.execute(
        "INSERT INTO decisions (pair_id, reviewer, action, text, input, at) VALUES (?, ?, ?, ?, ?, ?)",
        (pair_id, reviewer, action, (text or "").strip() if action == "edited" else None, text_id, now()),
    )
    if current is not None and current["text_id"] == text_id:
        _write_verdict(connection, pair_id, text_id)


def take_back(connection: sqlite3.Connection, decision: sqlite3.Row) -> None:
    """Marks a decision as undone within the caller's transaction, and renews the pair's verdict."""
    connection.execute("UPDATE decisions SET undone = ? WHERE id = ?", (now(), decision["id"]))
    pair_id, text_id = decision["pair_id"], decision["input"]
    standing = connection.execute(
        "SELECT 1 FROM results WHERE pair_id = ? AND step = ? AND input = ?", (pair_id, _STEP, text_id)
    ).fetchone()
    if standing and not _write_verdict(connection, pair_id, text_id):
        erase_result(connection, _STEP, pair_id, f"undone by {decision['reviewer']}")


def _write_verdict(connection: sqlite3.Connection, pair_id: int, text_id: str) -> bool:
    """The result that the decisions on a text come to; `False` where there are none."""
    rows = connection.execute(
        "SELECT reviewer, action, text FROM decisions WHERE pair_id = ? AND input = ? AND undone IS NULL ORDER BY id",
        (pair_id, text_id),
    ).fetchall()
    if not rows:
        return False
    actions = [action for _, action, _ in rows]
    # `max` takes the first of equals; of two edits the later counts.
    _, action, text = max(reversed(rows), key=lambda row: ACTIONS.index(row[1]))
    reason = DISAGREED if len(set(actions)) > 1 else ""
    details: dict[str, Any] = {"decisions": [[name, act] for name, act, _ in rows]}
    write_results(connection, _STEP, [Result(pair_id, _SETTINGS, text_id, action, reason, text, details)])
    return True


def measure_agreement(decisions: Sequence[tuple[str, str]]) -> Agreement:
    """
    Agreement over `(first, second)` decisions.

    Kappa is `(observed - expected) / (1 - expected)`, expected from how often each action stands first and second
    (Cohen 1960, A Coefficient of Agreement for Nominal Scales).
    """
    pairs = len(decisions)
    if not pairs:
        return Agreement(0, 0, None, None)
    agreed = sum(first == second for first, second in decisions)
    raw = agreed / pairs
    firsts, seconds = zip(*decisions)
    # Counts, not shares: exact, so that agreement by chance alone is told from nearly that.
    chance = sum(firsts.count(action) * seconds.count(action) for action in set(firsts))
    kappa = None if chance == pairs**2 else (raw - chance / pairs**2) / (1 - chance / pairs**2)
    return Agreement(pairs, agreed, raw, kappa)


def _names(project: Project) -> set[str]:
    """Pictures that are there, as `store.Pair.image` names them; one listing is quicker than asking for each."""
    folder = project.folder / IMAGES
    return {f"{IMAGES}/{name}" for name in os.listdir(folder)} if folder.is_dir() else set()


def _one(connection: sqlite3.Connection, query: str, values: Any) -> sqlite3.Row | None:
    cursor = connection.cursor()
    cursor.row_factory = sqlite3.Row  # type: ignore[assignment]
    return cursor.execute(query, values).fetchone()
