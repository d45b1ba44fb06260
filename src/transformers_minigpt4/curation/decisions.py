"""What people decide on pairs: each decision is one row, and together they make the pair's result of the review."""

import sqlite3
from typing import Literal, get_args

from transformers_minigpt4.utils.text import without_surrogates

from .database import erase_result, fetch, incoming, write_results
from .records import Result, now
from .settings_file import CurationError
from .store import AnyProject


Action = Literal["accepted", "edited", "rejected"]
ACTIONS: tuple[Action, ...] = get_args(Action)  # from the mildest to the strictest
STEP = "review"
DISAGREED = "reviewers disagreed"
_LONGEST_REASON = 100  # characters
_SETTINGS = ""  # people have none


def settle(project: AnyProject) -> int:
    """
    Writes the review's result of pairs that have decisions but no result.

    That happens when a text becomes again what it was when people decided on it: a rule was changed and changed back.

    Returns:
        How many pairs were affected.
    """
    query = f"""
        SELECT w.id, w.hash FROM ({incoming(STEP, project.config.repairs)}) AS w
        LEFT JOIN results AS r ON r.pair_id = w.id AND r.step = '{STEP}' AND r.input = w.hash
        WHERE r.pair_id IS NULL AND EXISTS (SELECT 1 FROM decisions AS d
            WHERE d.pair_id = w.id AND d.input = w.hash AND d.undone IS NULL)"""
    with project.transaction() as connection:
        rows = connection.execute(query).fetchall()
        for pair_id, text_id in rows:
            _write_result(connection, pair_id, text_id)
    return len(rows)


def check_action(action: str, text: str | None) -> None:
    """
    Raises:
        CurationError: for an unknown action, and for an edit without text.
    """
    if action not in ACTIONS:
        raise CurationError(f"{action!r} is not an action; it is one of {', '.join(ACTIONS)}")
    if action == "edited" and not (text or "").strip():
        raise CurationError("an edited pair needs its text; reject the pair if no part of the text is usable")


def clean_reason(reason: str) -> str:
    """One short line, since reasons are counted and shown as labels."""
    line = "".join(character if character.isprintable() else " " for character in reason)
    return " ".join(line.split())[:_LONGEST_REASON]


def same_text(text: str, other: str) -> bool:
    """Whether texts are the same except for surrounding white space and line endings, which browsers change."""
    return _plain(text) == _plain(other)


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def live_decision(connection: sqlite3.Connection, pair_id: int, reviewer: str, text_id: str) -> sqlite3.Row | None:
    """What this reviewer has decided on this text and not undone."""
    return fetch_one(
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
    reason: str = "",
) -> None:
    """
    Writes a decision within the caller's transaction, and the pair's result if it is about the `current` text.

    `reason` says why a pair is rejected, and is ignored otherwise.
    """
    text = without_surrogates(text or "").strip()
    if action == "edited" and current is not None and current["text_id"] == text_id:
        action = "accepted" if same_text(text, current["after"]) else action
    connection.execute(
        "INSERT INTO decisions (pair_id, reviewer, action, text, reason, input, at) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            *(pair_id, reviewer, action, text if action == "edited" else None),
            *(clean_reason(reason) if action == "rejected" else "", text_id, now()),
        ),
    )
    if current is not None and current["text_id"] == text_id:
        _write_result(connection, pair_id, text_id)


def take_back(connection: sqlite3.Connection, decision: sqlite3.Row) -> None:
    """Marks a decision as undone within the caller's transaction, and updates the pair's result."""
    connection.execute("UPDATE decisions SET undone = ? WHERE id = ?", (now(), decision["id"]))
    pair_id, text_id = decision["pair_id"], decision["input"]
    has_result = connection.execute(
        "SELECT 1 FROM results WHERE pair_id = ? AND step = ? AND input = ?", (pair_id, STEP, text_id)
    ).fetchone()
    if has_result and not _write_result(connection, pair_id, text_id):
        erase_result(connection, STEP, pair_id, f"undone by {decision['reviewer']}")


def _write_result(connection: sqlite3.Connection, pair_id: int, text_id: str) -> bool:
    """Writes the result of the decisions on a text; `False` if there are none."""
    rows = connection.execute(
        "SELECT reviewer, action, text, reason FROM decisions WHERE pair_id = ? AND input = ? AND undone IS NULL "
        "ORDER BY id",
        (pair_id, text_id),
    ).fetchall()
    if not rows:
        return False
    actions = [row[1] for row in rows]
    # `max` takes the first of equals; of two edits, or two reasons, the later counts.
    _, action, text, why = max(reversed(rows), key=lambda row: ACTIONS.index(row[1]))
    reason = DISAGREED if len(set(actions)) > 1 else why
    details = {"decisions": [[*filter(None, (name, act, said))] for name, act, _, said in rows]}
    write_results(connection, STEP, [Result(pair_id, _SETTINGS, text_id, action, reason, text, details)])
    return True


def fetch_one(
    connection: sqlite3.Connection, query: str, values: tuple[object, ...] | dict[str, object]
) -> sqlite3.Row | None:
    """The first row of a query, or `None`."""
    row: sqlite3.Row | None = fetch(connection, query, values).fetchone()
    return row
