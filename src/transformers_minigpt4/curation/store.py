"""Keeps a curation project: one folder, one SQLite file with every pair's history, safe to stop at any moment."""

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from .config import CONFIG_FILE, CurationConfig, CurationError, load_config


DATABASE = "curation.sqlite"
IMAGES = "images"
SCHEMA_VERSION = 1
STEPS = ("generate", "repair", "filter", "review")
# Outcomes whose text the next step takes. What failed waits for the next run of its own step.
PASSING = {
    "generate": ("ok",),
    "repair": ("ok", "flagged"),
    "filter": ("kept",),
    "review": ("accepted", "edited"),
}
FAILED = "failed"
_PAGE = 1000  # pairs read at a time, so that no cursor stays open while a step writes
_BUSY_SECONDS = 30

_SCHEMA = """
-- `origin` is JSON: the row's key in the source, and the texts that came with it.
CREATE TABLE pairs (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, image TEXT NOT NULL, sha256 TEXT NOT NULL UNIQUE,
    source TEXT NOT NULL, source_key TEXT NOT NULL, origin TEXT NOT NULL, drawn_at TEXT NOT NULL,
    UNIQUE (source, source_key)
);
-- Rows of the source that were drawn and cannot be used.
CREATE TABLE skipped (
    source TEXT NOT NULL, source_key TEXT NOT NULL, kind TEXT NOT NULL, reason TEXT NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (source, source_key)
);
-- The latest result of each step. `settings`: digest of what the step depends on; `input` and `output`: digests of
-- the text that it read and of the text that it hands on. `text` is NULL where it hands on what it read.
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
-- What people decided, each reviewer for himself; `input` is the digest of the text shown, `undone` a time or NULL.
CREATE TABLE decisions (
    id INTEGER PRIMARY KEY, pair_id INTEGER NOT NULL REFERENCES pairs (id), reviewer TEXT NOT NULL,
    action TEXT NOT NULL, text TEXT, reason TEXT NOT NULL DEFAULT '', input TEXT NOT NULL, at TEXT NOT NULL,
    undone TEXT
);
CREATE INDEX decisions_by_pair ON decisions (pair_id, reviewer);
CREATE INDEX decisions_by_reviewer ON decisions (reviewer, id);
-- Pairs that a reviewer has in front of him until `until` (seconds since 1970), so that no other gets them.
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


@dataclass(frozen=True)
class Pair:
    """
    One drawn picture.

    `key` names its file and, later, its row of the data set; `image` is the path of the copy of its bytes, below the
    project's folder; `origin` holds what the source said of it: `key`, and texts such as `caption`.
    """

    id: int
    key: str
    image: str
    sha256: str
    source: str
    origin: dict[str, Any]
    drawn_at: str


@dataclass(frozen=True)
class Work:
    """A pair that a step has to look at, with the text of the step before (`""` for `generate`) and its digest."""

    pair: Pair
    text: str
    input: str


@dataclass(frozen=True)
class Result:
    """
    What a step found out about a pair.

    Args:
        pair_id: Of `Pair`.
        settings: Digest of what the step depends on (`config.settings_hash`).
        input: `Work.input`.
        outcome: `ok` or `failed` (generate); `ok`, `flagged` or `failed` (repair); `kept` or `dropped` (filter);
            `accepted`, `edited` or `rejected` (review).
        reason: A word or few that are counted, such as a rule's name; empty where there is nothing to say.
        text: The step's text, or `None` where it hands on what it read.
        details: Whatever else the step wants kept, as JSON values.
        at: When; filled in by `record`.
    """

    pair_id: int
    settings: str
    input: str
    outcome: str
    reason: str = ""
    text: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    at: str = ""


@dataclass(frozen=True)
class StepCount:
    """
    How many pairs came to a step and what became of them.

    `reached` = the sum of `outcomes` + `waiting`; pairs that failed, and those whose text has changed since the step
    last saw them, wait. `reasons` counts by outcome and reason, empty reasons left out.
    """

    step: str
    reached: int
    outcomes: dict[str, int]
    reasons: dict[str, dict[str, int]]
    waiting: int


@dataclass(frozen=True)
class Funnel:
    """The counts of a project: pictures wanted, drawn and skipped (by kind), then each step, then what is accepted."""

    wanted: int
    drawn: int
    skipped: dict[str, int]
    steps: list[StepCount]
    accepted: int


def text_hash(text: str) -> str:
    """The digest by which steps tell whether a text has changed."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def now() -> str:
    """This moment as the tables have it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Project:
    """
    A project's folder: settings, pictures, and the file of their histories. Use it as a context manager.

    Every method may be called from any thread; each thread has a connection of its own. Several processes may have one
    project open; those that run a step take turns by `writer`.

    Args:
        folder: The folder.
        config: Its settings, by default those of its `curation.yaml`.

    Raises:
        CurationError: if the folder is no project, or one of another schema version.
    """

    def __init__(self, folder: str | os.PathLike, config: CurationConfig | None = None) -> None:
        self.folder = Path(folder)
        self.config = config if config is not None else load_config(self.folder / CONFIG_FILE)
        self.steps = tuple(step for step in STEPS if step != "repair" or self.config.repairs)
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []

    @classmethod
    def create(cls, folder: str | os.PathLike, config: CurationConfig | None = None) -> "Project":
        """Opens a project, and makes its database first where there is none."""
        project = cls(folder, config)
        (project.folder / IMAGES).mkdir(parents=True, exist_ok=True)
        if not project.database.exists():
            with project.writer("init"):
                if not project.database.exists():
                    project._make_database()
        return project._checked()

    @classmethod
    def open(cls, folder: str | os.PathLike, config: CurationConfig | None = None) -> "Project":
        """Opens a project that `create` made."""
        project = cls(folder, config)
        if not project.database.exists():
            raise CurationError(f"{project.folder} holds no {DATABASE} yet; run `minigpt4 curate generate` first")
        return project._checked()

    def __enter__(self) -> "Project":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections of all threads."""
        while self._connections:
            self._connections.pop().close()
        self._local = threading.local()

    @property
    def database(self) -> Path:
        return self.folder / DATABASE

    def image_path(self, pair: Pair) -> Path:
        """Where the copy of a pair's picture lies. It may be missing: people delete files."""
        return self.folder / pair.image

    def _make_database(self) -> None:
        # Made under another name: a kill halfway must not leave a file without tables.
        scratch = self.folder / f".{DATABASE}-{os.getpid()}"
        scratch.unlink(missing_ok=True)
        with plain_errors(self.folder):
            connection = sqlite3.connect(scratch)
            try:
                connection.executescript(_SCHEMA)
                connection.execute("INSERT INTO meta VALUES ('made_at', ?)", (now(),))
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.commit()
                connection.execute("PRAGMA journal_mode = WAL")
            finally:
                connection.close()
        os.replace(scratch, self.database)

    def _checked(self) -> "Project":
        with plain_errors(self.folder):
            (version,) = self.connection().execute("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            self.close()
            age = "an older" if version < SCHEMA_VERSION else "a newer"
            raise CurationError(
                f"{self.database} was made by {age} version of this package (schema {version}, and this one reads "
                f"{SCHEMA_VERSION}); go on with that version, or start a new project folder"
            )
        return self

    def connection(self) -> sqlite3.Connection:
        """This thread's connection, in autocommit mode; write through `transaction`."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            # Closed by whichever thread closes the project.
            connection = sqlite3.connect(
                self.database, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            # FULL: what `record` and a reviewer's decision have written is on the disk when they return.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            self._local.connection = connection
            self._connections.append(connection)
        return connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """
        All that is written inside, or nothing, and on the disk at the end.

        Raises:
            CurationError: if the disk is full, or another process does not let go of the database.
        """
        connection = self.connection()
        with plain_errors(self.folder):
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def writer(self, step: str) -> Iterator[None]:
        """
        Held while a process runs a step; the system lets go of it when the process ends, however it ends.

        Raises:
            CurationError: when another process runs a step of this project.
        """
        with open(self.folder / ".lock", "a+", encoding="utf-8") as file:
            _lock(file, self.folder, step)
            file.truncate(0)
            file.write(f"{step}, process {os.getpid()}")
            file.flush()
            yield

    def pairs(self) -> Iterator[Pair]:
        """All pairs in the order of drawing."""
        for row in self._paged("SELECT * FROM pairs WHERE id > :after ORDER BY id"):
            yield _pair(row)

    def add_pairs(self, rows: Sequence[tuple[str, str, str, dict[str, Any]]], source: str) -> None:
        """
        Adds drawn pictures, all or none.

        Args:
            rows: `(key, image, sha256, origin)` with the source's key as `origin["key"]`.
            source: What they were drawn from.
        """
        with self.transaction() as connection:
            connection.executemany(
                "INSERT INTO pairs (key, image, sha256, source, source_key, origin, drawn_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (key, image, digest, source, str(origin["key"]), _json(origin), now())
                    for key, image, digest, origin in rows
                ],
            )

    def add_skipped(self, source: str, source_key: str, kind: str, reason: str) -> None:
        """Notes a drawn row that cannot be used; `kind` is counted, `reason` read by people."""
        with self.transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO skipped VALUES (?, ?, ?, ?, ?)", (source, source_key, kind, reason, now())
            )

    def meta(self, key: str) -> str | None:
        """A value that a step has left."""
        row = self.connection().execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def set_meta(self, key: str, value: str) -> None:
        """Leaves a value for later runs."""
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def pending(self, step: str, settings: str, *, retry_failed: bool = True) -> Iterator[Work]:
        """
        The pairs that a step has to look at, in the order of drawing.

        These are the pairs that the step before passed on and that have no result of this step yet, or one of other
        settings or of another text, or one that failed. Results may be recorded while this is being read.

        Args:
            step: One of `STEPS`.
            settings: Digest of what the step depends on now.
            retry_failed: Whether to try again what failed with the same settings and text.
        """
        query = f"""
            SELECT p.*, w.text, w.hash FROM ({incoming(step, self.config.repairs)}) AS w
            JOIN pairs AS p ON p.id = w.id
            LEFT JOIN results AS r ON r.pair_id = w.id AND r.step = :step
            WHERE w.id > :after AND (r.step IS NULL OR r.settings != :settings OR r.input != w.hash
                OR (r.outcome = '{FAILED}' AND :retry))
            ORDER BY w.id"""
        for row in self._paged(query, step=step, settings=settings, retry=retry_failed):
            yield Work(_pair(row), row["text"] or "", row["hash"])

    def record(self, step: str, results: Iterable[Result]) -> None:
        """
        Writes results, each in place of the pair's earlier one of that step, and all to the history.

        They are on the disk when this returns; a kill before leaves none of them.
        """
        with self.transaction() as connection:
            write_results(connection, step, results)

    def current(self, step: str) -> Iterator[tuple[Pair, Result]]:
        """
        The results of a step that still hold: of pairs that reach it, and of the text that they reach it with.

        `Result.text` is `None` where the step handed on what it read; see `texts`.
        """
        query = f"""
            SELECT p.*, r.pair_id, r.settings, r.input, r.outcome, r.reason, r.text, r.details, r.at
            FROM ({incoming(step, self.config.repairs)}) AS w JOIN pairs AS p ON p.id = w.id
            JOIN results AS r ON r.pair_id = w.id AND r.step = :step AND r.input = w.hash
            WHERE w.id > :after ORDER BY w.id"""
        for row in self._paged(query, step=step):
            yield _pair(row), _result(row)

    def texts(self, step: str) -> Iterator[tuple[Pair, str]]:
        """The text with which each pair reaches a step, of those that do."""
        query = f"""
            SELECT p.*, w.text FROM ({incoming(step, self.config.repairs)}) AS w
            JOIN pairs AS p ON p.id = w.id WHERE w.id > :after ORDER BY w.id"""
        for row in self._paged(query):
            yield _pair(row), row["text"] or ""

    def accepted(self, unreviewed: bool = False) -> Iterator[tuple[Pair, str]]:
        """
        The pairs of the data set, with the text that people accepted or wrote.

        Args:
            unreviewed: Whether to give also what the filter kept and nobody has decided on.
        """
        for row in self._paged(_accepted(self.config.repairs, unreviewed)):
            yield _pair(row), row["text"]

    def history(self, pair_id: int) -> list[tuple[str, Result]]:
        """Every result that a pair has ever had, as `(step, result)`, oldest first."""
        rows = self._rows("SELECT * FROM history WHERE pair_id = :pair ORDER BY id", pair=pair_id)
        return [(row["step"], _result(row)) for row in rows]

    def skipped(self) -> list[dict[str, str]]:
        """Rows of the source that could not be used: `source`, `source_key`, `kind`, `reason`, `at`."""
        return [dict(row) for row in self._rows("SELECT * FROM skipped ORDER BY rowid")]

    def funnel(self) -> Funnel:
        """How many pairs came to each step, what became of them, and why."""
        (drawn,) = self._rows("SELECT count(*) FROM pairs")[0]
        skipped = self._rows("SELECT kind, count(*) FROM skipped GROUP BY kind ORDER BY count(*) DESC, kind")
        accepted = self._rows(f"SELECT count(*) FROM ({_accepted(self.config.repairs, False)})", after=0)
        return Funnel(
            wanted=self.config.images,
            drawn=drawn,
            skipped={row[0]: row[1] for row in skipped},
            steps=[self._step_count(step) for step in self.steps],
            accepted=accepted[0][0],
        )

    def _step_count(self, step: str) -> StepCount:
        query = f"""
            SELECT r.outcome, r.reason, count(*) FROM ({incoming(step, self.config.repairs)}) AS w
            LEFT JOIN results AS r ON r.pair_id = w.id AND r.step = :step AND r.input = w.hash
            GROUP BY r.outcome, r.reason ORDER BY count(*) DESC, r.reason"""
        outcomes: dict[str, int] = {}
        reasons: dict[str, dict[str, int]] = {}
        waiting = reached = 0
        for outcome, reason, count in self._rows(query, step=step):
            reached += count
            if outcome is None:
                waiting += count
                continue
            outcomes[outcome] = outcomes.get(outcome, 0) + count
            if reason:
                reasons.setdefault(outcome, {})[reason] = count
        return StepCount(step, reached, outcomes, reasons, waiting)

    def _rows(self, query: str, **values: Any) -> list[sqlite3.Row]:
        with plain_errors(self.folder):
            cursor = self.connection().cursor()
            cursor.row_factory = sqlite3.Row  # type: ignore[assignment]
            return cursor.execute(query, values).fetchall()

    def _paged(self, query: str, **values: Any) -> Iterator[sqlite3.Row]:
        """The rows of a query on `id > :after`, in pages."""
        after = 0
        while rows := self._rows(f"{query} LIMIT {_PAGE}", after=after, **values):
            yield from rows
            after = rows[-1]["id"]


def write_results(connection: sqlite3.Connection, step: str, results: Iterable[Result]) -> None:
    """
    As [`Project.record`], within the caller's transaction.

    Raises:
        ValueError: for a step that does not exist.
    """
    if step not in STEPS:
        raise ValueError(f"there is no step {step!r}; it is one of {', '.join(STEPS)}")
    rows = [
        (
            *(result.pair_id, step, result.settings, result.input),
            result.input if result.text is None else text_hash(result.text),
            *(result.outcome, result.reason, result.text, _json(result.details), result.at or now()),
        )
        for result in results
    ]
    connection.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    connection.executemany(
        "INSERT INTO history (pair_id, step, settings, input, output, outcome, reason, text, details, at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        rows,
    )


def erase_result(connection: sqlite3.Connection, step: str, pair_id: int, reason: str) -> None:
    """Takes back a pair's result of a step, within the caller's transaction; the history says so (`undone`)."""
    connection.execute(
        "INSERT INTO history (pair_id, step, settings, input, output, outcome, reason, text, details, at) "
        "SELECT pair_id, step, settings, input, output, 'undone', ?, NULL, '{}', ? FROM results "
        "WHERE pair_id = ? AND step = ?",
        (reason, now(), pair_id, step),
    )
    connection.execute("DELETE FROM results WHERE pair_id = ? AND step = ?", (pair_id, step))


def incoming(step: str, repairs: bool) -> str:
    """SQL for the pairs that reach a step: `id`, `text` and `hash`. Results of a text that has changed do not pass."""
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


def _accepted(repairs: bool, unreviewed: bool) -> str:
    outcomes = ", ".join(f"'{outcome}'" for outcome in PASSING["review"])
    return f"""
        SELECT p.*, coalesce(r.text, w.text) AS text FROM ({incoming("review", repairs)}) AS w
        JOIN pairs AS p ON p.id = w.id
        LEFT JOIN results AS r ON r.pair_id = w.id AND r.step = 'review' AND r.input = w.hash
        WHERE w.id > :after AND (r.outcome IN ({outcomes}) OR (r.outcome IS NULL AND {int(unreviewed)}))
        ORDER BY w.id"""


def _pair(row: sqlite3.Row) -> Pair:
    return Pair(
        row["id"],
        row["key"],
        row["image"],
        row["sha256"],
        row["source"],
        json.loads(row["origin"]),
        row["drawn_at"],
    )


def _result(row: sqlite3.Row) -> Result:
    return Result(
        row["pair_id"],
        row["settings"],
        row["input"],
        row["outcome"],
        row["reason"],
        row["text"],
        json.loads(row["details"]),
        row["at"],
    )


def _json(value: Any) -> str:
    # ASCII: a file name of the source may hold what is no valid Unicode, which SQLite refuses.
    return json.dumps(value, sort_keys=True)


def _lock(file: IO[str], folder: Path, step: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise CurationError(
            f"another process works on {folder} ({file.read() or 'unknown'}), so {step} cannot; wait until it is "
            "through, or end it"
        ) from None


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
                f"cannot write to {folder / DATABASE} ({error}): is the disk full? Make room and run the same command "
                "again; all that was finished is kept"
            ) from error
        if name in ("SQLITE_BUSY", "SQLITE_LOCKED"):
            raise CurationError(
                f"{folder / DATABASE} has been locked by another process for {_BUSY_SECONDS} seconds; end that one "
                "and run again"
            ) from error
        if name in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
            raise CurationError(f"{folder / DATABASE} is damaged or no project ({error}); use a backup") from error
        raise
