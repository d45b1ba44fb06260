"""
Gives pairs to people and keeps their decisions: the queue behind the page and the files of a `review` command.

- A pair is due while its text, as the filter passed it on, has fewer decisions than it needs: one, or two for a share
  of the pairs, chosen by their keys (`review_twice`). Decisions on a text that has changed since do not count, so the
  pair is due again. Nobody sees a pair twice with the same text.
- The pair that somebody looks at is claimed for `CLAIM_SECONDS`; nobody else gets it. A claim is about who looks, not
  about who may decide: a late decision is kept like any other.
- Each decision is one row, on the disk before [`ReviewQueue.decide`] returns; undoing it marks the row.
- If two people disagree, the stricter decision counts (reject, then edit, then accept), and of two edits the later.
"""

import sqlite3
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from time import time

from transformers_minigpt4.web.html import person_name

from .agreement import Agreement, measure_agreement
from .database import fetch, incoming, plain_errors
from .decisions import STEP, add_decision, check_action, fetch_one, live_decision, settle, take_back
from .settings_file import CurationError
from .store import AnyProject


CLAIM_SECONDS = 900.0


@dataclass(frozen=True)
class ReviewPair:
    """
    A pair as a reviewer sees it.

    Args:
        id: Of `records.Pair`.
        key: Its key.
        image: Path of its image below the project's folder.
        before: The text as the model wrote it.
        after: The text to decide on.
        text_id: Digest of `after`.
        flag: Why the repair asks people to look closely; mostly empty.
        again: Whether the reviewer decided on another text of this pair before.
        decision: Id of the reviewer's decision on this text, or 0.
    """

    id: int
    key: str
    image: str
    before: str
    after: str
    text_id: str
    flag: str
    again: bool
    decision: int = 0


@dataclass(frozen=True)
class Progress:
    """
    Counts over the pairs that the filter kept.

    `due` counts what needs a decision, and `left` what of it the reviewer can still be shown, whoever looks at it now;
    `twice` and `twice_done` are the pairs that need two reviewers and those that had them; `missing` need a decision,
    but their image is missing.
    """

    pairs: int
    accepted: int
    edited: int
    rejected: int
    mine: int
    due: int
    left: int
    twice: int
    twice_done: int
    missing: int

    @property
    def decided(self) -> int:
        return self.accepted + self.edited + self.rejected


def wants_two(key: str, share: float) -> bool:
    """Whether a pair belongs to the `share` (0 to 1) that two people see; decided by its key, so it never changes."""
    return _position(key) < share


@lru_cache(maxsize=1 << 17)
def _position(key: str) -> float:
    return int.from_bytes(sha256(key.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


class ReviewQueue:
    """
    The pairs of a project in the order of sampling, for any number of reviewers, threads and processes at once.

    Args:
        project: The project; it is not closed here.
        claim_seconds: How long a pair is reserved for whoever looks at it.

    Reviewers are named as [`person_name`] spells them.
    """

    def __init__(self, project: AnyProject, claim_seconds: float = CLAIM_SECONDS) -> None:
        self.project, self.claim_seconds = project, claim_seconds
        self._incoming = incoming(STEP, project.config.repairs)
        self._known: dict[int, tuple[str, bool]] = {}
        settle(project)

    def next(self, reviewer: str) -> ReviewPair | None:
        """
        The pair that the reviewer is looking at, or else the next one, which is then claimed.

        Pairs whose image is missing are skipped; [`progress`] counts them.

        Raises:
            ValueError: for an invalid name.
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

    def open(self, reviewer: str, pair_id: int) -> tuple[ReviewPair | None, str]:
        """
        The pair that the reviewer chose, decided on or not; one that needs a decision is claimed.

        Returns:
            The pair, or `None` if it cannot be shown; and a message for the reviewer.

        Raises:
            ValueError: for an invalid name.
            CurationError: if the project's file cannot be written.
        """
        me = person_name(reviewer)
        with self.project.transaction() as connection:
            row = self.current(connection, pair_id, me)
            if row is None:
                return None, "That pair is not due for review: the filter has dropped it, or there is none."
            if not self.project.image_file(row["image"]).is_file():
                return None, f"The image of {row['key']} is missing, so the pair cannot be shown."
            earlier = live_decision(connection, pair_id, me, row["text_id"])
            if earlier is None:
                connection.execute("DELETE FROM claims WHERE reviewer = ?", (me,))
                self._claim(connection, pair_id, me)
                return self._pair(row), ""
        said = f"{earlier['action']} this pair{': ' if earlier['reason'] else ''}{earlier['reason']}"
        return self._pair(row), f"You have {said}. If you decide again, that replaces it."

    def decide(
        self,
        reviewer: str,
        pair_id: int,
        text_id: str,
        action: str,
        text: str | None = None,
        reason: str = "",
        replaces: int = 0,
    ) -> str:
        """
        Keeps a decision; it is on the disk when this returns.

        Args:
            reviewer: Who decided.
            pair_id: `ReviewPair.id`.
            text_id: `ReviewPair.text_id`, to recognize a decision on a text that has changed meanwhile.
            action: One of `ACTIONS`.
            text: For `"edited"`, the new text. One that equals the old text makes the decision `"accepted"`.
            reason: For `"rejected"`, why, in a few words.
            replaces: `ReviewPair.decision`, if the reviewer saw their earlier decision and changes it.

        Returns:
            A message for the reviewer, mostly empty: that they have decided on this text before, which stays valid; or
            that the text has changed and will be shown again.

        Raises:
            ValueError: for an invalid name, pair or action, and for an edit without text or one that the project
                cannot use.
            CurationError: if the project's file cannot be written.
        """
        me = person_name(reviewer)
        check_action(action, text)
        if action == "edited":
            self.project.check_edit(text or "")
        with self.project.transaction() as connection:
            known = connection.execute("SELECT 1 FROM pairs WHERE id = ?", (pair_id,)).fetchone()
            if known is None:
                raise CurationError(f"there is no pair {pair_id} in this project; reload the page")
            earlier = live_decision(connection, pair_id, me, text_id)
            if earlier is not None and earlier["id"] == replaces:
                take_back(connection, earlier)
            elif earlier is not None:
                return f"You {earlier['action']} this pair before; undo that first to change your decision."
            current = self.current(connection, pair_id)
            add_decision(connection, pair_id, me, text_id, action, text, current, reason)
            connection.execute("DELETE FROM claims WHERE reviewer = ? AND pair_id = ?", (me, pair_id))
        if current is None:
            return (
                "The filter has dropped this pair meanwhile; your decision is kept and counts if the pair comes back."
            )
        if current["text_id"] != text_id:
            return "The text changed while you looked at it. Your decision is kept; you will be shown the new text."
        return ""

    def undo(self, reviewer: str) -> tuple[ReviewPair | None, str]:
        """
        Takes back the reviewer's last decision and gives the pair again.

        Returns:
            The pair, or `None` if it cannot be shown; and a message for the reviewer.

        Raises:
            ValueError: for an invalid name.
            CurationError: if the project's file cannot be written.
        """
        me = person_name(reviewer)
        with self.project.transaction() as connection:
            mine = "SELECT * FROM decisions WHERE reviewer = ? AND undone IS NULL ORDER BY id DESC LIMIT 1"
            last = fetch_one(connection, mine, (me,))
            if last is None:
                return None, "There is nothing to undo."
            take_back(connection, last)
            current = self.current(connection, last["pair_id"], me)
            if current is None:
                return None, "Undone. The filter has dropped that pair meanwhile, so it is not shown again."
            if not self.project.image_file(current["image"]).is_file():
                return None, f"Undone. The image of {current['key']} is missing, so the pair cannot be shown."
            connection.execute("DELETE FROM claims WHERE reviewer = ? OR until < ?", (me, time()))
            self._claim(connection, current["id"], me)
        return self._pair(current), f"Undone: you had {last['action']} this pair."

    def progress(self, reviewer: str | None = None) -> Progress:
        """The counts, `mine` and `left` for one reviewer (0 and 0 without)."""
        me = person_name(reviewer) if reviewer is not None else ""
        counts = dict.fromkeys(Progress.__annotations__.keys() - {"pairs"}, 0)
        names: dict[int, set[str]] = {}
        with plain_errors(self.project.folder):
            connection = self.project.connection()
            text_ids = dict(connection.execute(f"SELECT id, hash FROM ({self._incoming})").fetchall())
            results = connection.execute("SELECT pair_id, input, outcome FROM results WHERE step = ?", (STEP,))
            for pair_id, text_id, outcome in results:
                if text_ids.get(pair_id) == text_id:
                    counts[outcome] += 1
            decisions = connection.execute("SELECT pair_id, input, reviewer FROM decisions WHERE undone IS NULL")
            for pair_id, text_id, name in decisions:
                if text_ids.get(pair_id) == text_id:
                    names.setdefault(pair_id, set()).add(name)
            known = self._known_pairs(connection)
        there = self.project.existing_images(known[pair_id][0] for pair_id in text_ids)
        for pair_id in text_ids:
            (image, two), who = known[pair_id], names.get(pair_id, ())
            counts["mine"] += me in who
            counts["twice"] += two
            counts["twice_done"] += two and len(who) >= 2
            if len(who) < 1 + two:
                gone = image not in there
                counts["missing"] += gone
                counts["due"] += not gone
                counts["left"] += bool(me) and me not in who and not gone
        return Progress(pairs=len(text_ids), **counts)

    def _known_pairs(self, connection: sqlite3.Connection) -> dict[int, tuple[str, bool]]:
        """Each pair's image and whether it needs two reviewers; neither ever changes, so only new pairs are read."""
        known, share = self._known, self.project.config.review_twice
        rows = connection.execute("SELECT id, image, key FROM pairs WHERE id > ?", (max(known, default=0),))
        if new := {pair_id: (image, wants_two(key, share)) for pair_id, image, key in rows}:
            known = self._known = known | new  # another dict: other threads may be reading the old one
        return known

    def agreement(self) -> Agreement:
        """Over all texts that two people decided on, even if they have changed since."""
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
        All pairs that need a decision (of this reviewer, if named), claimed or not.

        Returns:
            The pairs, and the keys of those whose image is missing.
        """
        me = person_name(reviewer) if reviewer is not None else ""
        with plain_errors(self.project.folder):
            rows = self._rows(self.project.connection(), _DUE, me).fetchall()
        there = self.project.existing_images(row["image"] for row in rows)
        pairs = [self._pair(row) for row in rows if row["image"] in there]
        return pairs, [row["key"] for row in rows if row["image"] not in there]

    def decided(self, reviewer: str | None = None) -> list[tuple[ReviewPair, sqlite3.Row]]:
        """The decisions (of this reviewer, if named) on texts as they are now: pairs with rows of `decisions`."""
        me = person_name(reviewer) if reviewer is not None else None
        with plain_errors(self.project.folder):
            connection = self.project.connection()
            pairs = {row["id"]: self._pair(row) for row in self._rows(connection, "1", me or "")}
            rows = fetch(connection, "SELECT * FROM decisions WHERE undone IS NULL ORDER BY pair_id, id").fetchall()
        return [
            (pairs[row["pair_id"]], row)
            for row in rows
            if row["pair_id"] in pairs
            and row["input"] == pairs[row["pair_id"]].text_id
            and me in (None, row["reviewer"])
        ]

    def current(self, connection: sqlite3.Connection, pair_id: int, reviewer: str = "") -> sqlite3.Row | None:
        """A pair as it reaches the review now, or `None` if it does not."""
        return fetch_one(connection, f"{self._select()} WHERE p.id = :pair", {"pair": pair_id, "me": reviewer})

    def _select(self) -> str:
        """
        The pairs that reach the review, with the columns of `ReviewPair`; `:me` is the reviewer.

        With CROSS JOIN and `+p.id`, SQLite goes through the pairs in order and stops at the first one requested.
        """
        return f"""
            SELECT w.id, p.key, p.image, coalesce(g.text, '') AS before, w.text AS after, w.hash AS text_id,
                CASE WHEN f.outcome = 'flagged' THEN f.reason ELSE '' END AS flag,
                EXISTS (SELECT 1 FROM decisions AS d WHERE d.pair_id = w.id AND d.reviewer = :me
                    AND d.input != w.hash AND d.undone IS NULL) AS again,
                coalesce((SELECT d.id FROM decisions AS d WHERE d.pair_id = w.id AND d.reviewer = :me
                    AND d.input = w.hash AND d.undone IS NULL), 0) AS decision
            FROM pairs AS p CROSS JOIN ({self._incoming}) AS w ON w.id = +p.id
            LEFT JOIN results AS g ON g.pair_id = w.id AND g.step = 'generate'
            LEFT JOIN results AS f ON f.pair_id = w.id AND f.step = 'repair' AND f.output = w.hash
            LEFT JOIN claims AS c ON c.pair_id = w.id"""

    def _rows(self, connection: sqlite3.Connection, where: str, me: str) -> sqlite3.Cursor:
        share = self.project.config.review_twice
        connection.create_function("wanted", 1, lambda key: 1 + wants_two(key, share), deterministic=True)
        return fetch(connection, f"{self._select()} WHERE {where} ORDER BY p.id", {"me": me, "now": time()})

    def _first(self, connection: sqlite3.Connection, where: str, me: str) -> sqlite3.Row | None:
        """The first such pair whose image exists."""
        for row in self._rows(connection, where, me):
            if self.project.image_file(row["image"]).is_file():
                return row
        return None

    def _claim(self, connection: sqlite3.Connection, pair_id: int, me: str) -> None:
        # After an undo, somebody else may be looking at the pair, and keeps the claim: both may decide.
        connection.execute(
            "INSERT INTO claims VALUES (:pair, :me, :until) ON CONFLICT (pair_id) DO UPDATE "
            "SET reviewer = :me, until = :until WHERE until < :now",
            {"pair": pair_id, "me": me, "until": time() + self.claim_seconds, "now": time()},
        )

    @staticmethod
    def _pair(row: sqlite3.Row) -> ReviewPair:
        return ReviewPair(**{**dict(row), "again": bool(row["again"])})


# Needs a decision, and `:me` has not made one. `w`, `p` and `c` as in `ReviewQueue._select`.
_DUE = """
    (SELECT count(DISTINCT d.reviewer) FROM decisions AS d
     WHERE d.pair_id = w.id AND d.input = w.hash AND d.undone IS NULL) < wanted(p.key)
    AND NOT EXISTS (SELECT 1 FROM decisions AS d
     WHERE d.pair_id = w.id AND d.reviewer = :me AND d.input = w.hash AND d.undone IS NULL)"""
