"""The SQLite file of a curation project: its tables, queries that several modules share, and plain errors."""

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from transformers_minigpt4.utils.text import without_surrogates

from .records import PASSING, STEPS, Pair, Result, now, text_hash
from .settings_file import CurationError


DATABASE = "curation.sqlite"
SCHEMA_VERSION = 2
BUSY_SECONDS = 30  # that a process waits for another one to finish writing

SCHEMA = """
-- `origin` is JSON: the row's key in the source and the texts that came with it.
CREATE TABLE pairs (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, image TEXT NOT NULL, sha256 TEXT NOT NULL UNIQUE,
    source TEXT NOT NULL, source_key TEXT NOT NULL, origin TEXT NOT NULL, sampled_at TEXT NOT NULL,
    UNIQUE (source, source_key)
);
-- Rows of the source that were sampled and cannot be used.
CREATE TABLE skipped (
    source TEXT NOT NULL, source_key TEXT NOT NULL, kind TEXT NOT NULL, reason TEXT NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (source, source_key)
);
-- The latest result of each step. `settings`: digest of what the step depends on; `input` and `output`: digests of
-- the text that it read and of the text that it passes on. `text` is NULL where both are the same.
CREATE TABLE results (
    pair_id INTEGER NOT NULL REFERENCES pairs (id), step TEXT NOT NULL, settings TEXT NOT NULL, input TEXT NOT NULL,
    output TEXT NOT NULL, outcome TEXT NOT NULL, reason TEXT NOT NULL, text TEXT, details TEXT NOT NULL,
    at TEXT NOT NULL, PRIMARY KEY (pair_id, step)
);
CREATE TABLE history (
    id INTEGER PRIMARY KEY, pair_id INTEGER NOT NULL REFERENCES pairs (id), step TEXT NOT NULL,
    settings TEXT NOT NULL, input TEXT NOT NULL, output TEXT NOT NULL, outcome TEXT NOT NULL, reason TEXT NOT NULL,
    text TEXT, details TEXT NOT NULL, at TEXT NOT NULL
);
CREATE INDEX history_by_pair ON history (pair_id, id);
-- What each reviewer decided; `input` is the digest of the text shown, `undone` a time or NULL.
CREATE TABLE decisions (
    id INTEGER PRIMARY KEY, pair_id INTEGER NOT NULL REFERENCES pairs (id), reviewer TEXT NOT NULL,
    action TEXT NOT NULL, text TEXT, reason TEXT NOT NULL DEFAULT '', input TEXT NOT NULL, at TEXT NOT NULL,
    undone TEXT
);
CREATE INDEX decisions_by_pair ON decisions (pair_id, reviewer);
CREATE INDEX decisions_by_reviewer ON decisions (reviewer, id);
-- Pairs that a reviewer is looking at until `until` (seconds since 1970), so that nobody else gets them.
CREATE TABLE claims (
    pair_id INTEGER PRIMARY KEY REFERENCES pairs (id), reviewer TEXT NOT NULL, until REAL NOT NULL
);
-- What each run of `repair` used.
CREATE TABLE requests (
    id INTEGER PRIMARY KEY, at TEXT NOT NULL, model TEXT NOT NULL, requests INTEGER NOT NULL,
    cached INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL NOT NULL
);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


def write_results(connection: sqlite3.Connection, step: str, results: Iterable[Result]) -> None:
    """
    As [`~store.Project.record`], within the caller's transaction.

    Raises:
        ValueError: for a step that does not exist.
    """
    if step not in STEPS:
        raise ValueError(f"there is no step {step!r}; it is one of {', '.join(STEPS)}")
    rows = [
        (
            *(result.pair_id, step, result.settings, result.input),
            result.input if result.text is None else text_hash(result.text),
            *(result.outcome, result.reason, result.text, ascii_json(result.details), result.at or now()),
        )
        for result in map(_storable, results)
    ]
    connection.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    connection.executemany(
        "INSERT INTO history (pair_id, step, settings, input, output, outcome, reason, text, details, at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        rows,
    )


def _storable(result: Result) -> Result:
    """With `?` for half surrogate pairs, which models and libraries may write and SQLite refuses."""
    text = None if result.text is None else without_surrogates(result.text)
    return replace(result, text=text, reason=without_surrogates(result.reason))


def file_name(key: str) -> str:
    """A key that is the name of a file, which may not be valid Unicode, as SQLite can store it; no two become one."""
    return key.encode("utf-8", "backslashreplace").decode()


def erase_result(connection: sqlite3.Connection, step: str, pair_id: int, reason: str) -> None:
    """Deletes a pair's result of a step, within the caller's transaction; the history keeps it as `undone`."""
    connection.execute(
        "INSERT INTO history (pair_id, step, settings, input, output, outcome, reason, text, details, at) "
        "SELECT pair_id, step, settings, input, output, 'undone', ?, NULL, '{}', ? FROM results "
        "WHERE pair_id = ? AND step = ?",
        (reason, now(), pair_id, step),
    )
    connection.execute("DELETE FROM results WHERE pair_id = ? AND step = ?", (pair_id, step))


def incoming(step: str, repairs: bool) -> str:
    """SQL for the pairs that reach a step: `id`, `text` and `hash`. Results of another text do not count."""
    if step not in STEPS:
        raise ValueError(f"there is no step {step!r}; it is one of {', '.join(STEPS)}")
    if step == "generate":
        return "SELECT id, NULL AS text, sha256 AS hash FROM pairs"
    before = STEPS[STEPS.index(step) - 1]
    if before == "repair" and not repairs:
        before = "generate"
    outcomes = ", ".join(f"'{outcome}'" for outcome in PASSING[before])
    return f"""
        SELECT i.id, coalesce(r.text, i.text) AS text, r.output AS hash FROM ({incoming(before, repairs)}) AS i
        JOIN results AS r ON r.pair_id = i.id AND r.step = '{before}' AND r.input = i.hash
        WHERE r.outcome IN ({outcomes})"""


def accepted_pairs(repairs: bool, unreviewed: bool) -> str:
    """SQL for the pairs of the dataset with their texts, those with `id > :after`; see `Project.accepted`."""
    outcomes = ", ".join(f"'{outcome}'" for outcome in PASSING["review"])
    return f"""
        SELECT p.*, coalesce(r.text, w.text) AS text FROM ({incoming("review", repairs)}) AS w
        JOIN pairs AS p ON p.id = w.id
        LEFT JOIN results AS r ON r.pair_id = w.id AND r.step = 'review' AND r.input = w.hash
        WHERE w.id > :after AND (r.outcome IN ({outcomes}) OR (r.outcome IS NULL AND {int(unreviewed)}))
        ORDER BY w.id"""


def pair_of(row: sqlite3.Row) -> Pair:
    origin = json.loads(row["origin"])
    return Pair(row["id"], row["key"], row["image"], row["sha256"], row["source"], origin, row["sampled_at"])


def result_of(row: sqlite3.Row) -> Result:
    outcome = row["outcome"], row["reason"], row["text"]
    return Result(row["pair_id"], row["settings"], row["input"], *outcome, json.loads(row["details"]), row["at"])


def ascii_json(value: object) -> str:
    # ASCII: a file name of the source may not be valid Unicode, which SQLite refuses.
    return json.dumps(value, sort_keys=True)


def fetch(
    connection: sqlite3.Connection, query: str, values: Sequence[object] | Mapping[str, object] = ()
) -> sqlite3.Cursor:
    """Runs a query whose rows are read by the columns' names."""
    cursor = connection.cursor()
    cursor.row_factory = sqlite3.Row
    return cursor.execute(query, values)


@contextlib.contextmanager
def plain_errors(folder: Path) -> Iterator[None]:
    """
    Says in one line what SQLite could not do.

    Raises:
        CurationError: in place of `sqlite3.DatabaseError`.
    """
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL" or name.startswith("SQLITE_IOERR"):
            raise CurationError(
                f"cannot write to {folder / DATABASE} ({error}): is the disk full? Free some space and run the same "
                "command again; all that was finished is kept"
            ) from error
        if name in ("SQLITE_BUSY", "SQLITE_LOCKED"):
            raise CurationError(
                f"{folder / DATABASE} has been locked by another process for {BUSY_SECONDS} seconds; end that one "
                "and run again"
            ) from error
        if name in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
            raise CurationError(f"{folder / DATABASE} is damaged or not a project ({error}); use a backup") from error
        raise
