"""Keeps a curation project: one folder, one SQLite file with every pair's history, safe to stop at any moment."""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeAlias, TypeVar

from transformers_minigpt4.utils.files import JsonObject, atomic_file, folder_lock

from .config import SETTINGS, CurationConfig
from .database import (
    BUSY_SECONDS,
    DATABASE,
    SCHEMA,
    SCHEMA_VERSION,
    accepted_pairs,
    ascii_json,
    fetch,
    file_name,
    incoming,
    pair_of,
    plain_errors,
    result_of,
    write_results,
)
from .records import FAILED, IMAGES, STEPS, Funnel, Pair, Result, StepCount, Work, now
from .settings_file import CurationError, SettingsFile


_PAGE = 1000  # pairs read at a time, so that no cursor stays open while a step writes


class ProjectConfig(Protocol):
    """What every kind of project has among its settings; see [`CurationConfig`]."""

    @property
    def repairs(self) -> bool: ...
    @property
    def wanted(self) -> int: ...
    @property
    def review_guideline(self) -> str: ...
    @property
    def review_reasons(self) -> list[str]: ...
    @property
    def review_twice(self) -> float: ...


Config = TypeVar("Config", bound=ProjectConfig)


class ProjectStore(Generic[Config]):
    """
    A project's folder: settings and the file of its pairs' histories. Use it as a context manager.

    Every method may be called from any thread; each thread has its own connection. Several processes may have one
    project open; those that run a step take turns by `writer`. Subclasses say what kind of project it is.

    Args:
        folder: The folder.
        config: Its settings, by default those of its settings file.

    Raises:
        CurationError: if the folder is not a project, or one of another schema version.
    """

    settings_file: ClassVar[SettingsFile[Any]]
    command: ClassVar[str]  # whose subcommands are the steps
    finish: ClassVar[str]  # the subcommand that follows the review
    what: ClassVar[str]  # a pair's text, in words
    sampled: ClassVar[str]  # label of the pairs that no step has processed yet
    # What each step has done with the pairs that it passes on.
    step_words: ClassVar[Mapping[str, str]]

    def __init__(self, folder: str | os.PathLike[str], config: Config | None = None) -> None:
        self.folder = Path(folder)
        self.config: Config = config or self.settings_file.read(self.folder / self.settings_file.name)
        self.steps = tuple(step for step in STEPS if step != "repair" or self.config.repairs)
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []

    @classmethod
    def create(cls, folder: str | os.PathLike[str], config: Config | None = None) -> Self:
        """Opens a project, and creates its database if it does not exist."""
        project = cls(folder, config)
        project.prepare()
        if not project.database.exists():
            with project.writer("init"):
                if not project.database.exists():
                    project._create_database()
        return project._checked()

    @classmethod
    def open(cls, folder: str | os.PathLike[str], config: Config | None = None) -> Self:
        """Opens a project that `create` has created."""
        project = cls(folder, config)
        if not project.database.exists():
            raise CurationError(f"{project.folder} holds no {DATABASE} yet; run `{cls.command} generate` first")
        return project._checked()

    def __enter__(self) -> Self:
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

    @property
    def images(self) -> Path:
        """The folder that all images are in or below."""
        return self.folder / IMAGES

    def prepare(self) -> None:
        """Creates what the folder needs besides the database."""

    def image_file(self, image: str) -> Path:
        """The file of `Pair.image`. It may be missing: people delete files."""
        return self.folder / image

    def image_path(self, pair: Pair) -> Path:
        """The file of a pair's image, see [`image_file`]."""
        return self.image_file(pair.image)

    def image_name(self, image: str) -> str:
        """The path below `images` of `Pair.image`."""
        return self.image_file(image).relative_to(self.images).as_posix()

    def existing_images(self, images: Iterable[str]) -> set[str]:
        """Those of several `Pair.image` whose files exist."""
        return {image for image in images if self.image_file(image).is_file()}

    def check_edit(self, text: str) -> None:
        """
        Checks a text that a person has edited.

        Raises:
            CurationError: if the project cannot use it.
        """

    def _create_database(self) -> None:
        # Under another name first: a kill halfway must not leave a file without tables.
        with plain_errors(self.folder), atomic_file(self.database) as scratch:
            connection = sqlite3.connect(scratch)
            try:
                connection.executescript(SCHEMA)
                connection.execute("INSERT INTO meta VALUES ('made_at', ?)", (now(),))
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.commit()
                connection.execute("PRAGMA journal_mode = WAL")
            finally:
                connection.close()

    def _checked(self) -> Self:
        with plain_errors(self.folder):
            (version,) = self.connection().execute("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            self.close()
            age = "an older" if version < SCHEMA_VERSION else "a newer"
            raise CurationError(
                f"{self.database} was made by {age} version of this package (schema {version}, and this one reads "
                f"{SCHEMA_VERSION}); use that version, or start a new project folder"
            )
        return self

    def connection(self) -> sqlite3.Connection:
        """This thread's connection, in autocommit mode; write through `transaction`."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            # Closed by whichever thread closes the project.
            connection = sqlite3.connect(
                self.database, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
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
        Writes everything inside of it, or nothing; it is on the disk at the end.

        Raises:
            CurationError: if the disk is full, or another process does not release the database.
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

    def writer(self, step: str) -> AbstractContextManager[None]:
        """
        Held while a process runs a step; the system releases it when the process ends, however it ends.

        Raises:
            CurationError: when another process runs a step of this project.
        """
        refusal = (
            f"another process works on {self.folder} ({{owner}}), so {step} cannot; wait until it has finished, or "
            "stop it"
        )
        return folder_lock(self.folder, refusal, purpose=step, error=CurationError)

    def pairs(self) -> Iterator[Pair]:
        """All pairs in the order of sampling."""
        for row in self._paged("SELECT * FROM pairs WHERE id > :after ORDER BY id"):
            yield pair_of(row)

    def add_pairs(self, rows: Sequence[tuple[str, str, str, JsonObject]], source: str) -> None:
        """
        Adds sampled images, all or none.

        Args:
            rows: `(key, image, sha256, origin)` with the source's key as `origin["key"]`.
            source: What they were sampled from.
        """
        with self.transaction() as connection:
            connection.executemany(
                "INSERT INTO pairs (key, image, sha256, source, source_key, origin, sampled_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (key, image, digest, file_name(source), file_name(str(origin["key"])), ascii_json(origin), now())
                    for key, image, digest, origin in rows
                ],
            )

    def add_skipped(self, source: str, *rows: tuple[str, str, str]) -> None:
        """Notes rows of the source that cannot be used: key, kind (which is counted), and the reason, for people."""
        with self.transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO skipped VALUES (?, ?, ?, ?, ?)",
                [(file_name(source), file_name(key), kind, file_name(why), now()) for key, kind, why in rows],
            )

    def meta(self, key: str) -> str | None:
        """A value that a step has kept."""
        row = self.connection().execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def set_meta(self, key: str, value: str) -> None:
        """Keeps a value for later runs."""
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def pending(self, step: str, settings: str) -> Iterator[Work]:
        """
        The pairs that a step has to process, in the order of sampling.

        These are the pairs that the previous step passed on and that have no result of this step yet, or one of other
        settings or of another text, or one that failed. Results may be recorded while this is being read.

        Args:
            step: One of `STEPS`.
            settings: Digest of what the step depends on now.
        """
        query = f"""
            SELECT p.*, w.text, w.hash FROM ({incoming(step, self.config.repairs)}) AS w
            JOIN pairs AS p ON p.id = w.id
            LEFT JOIN results AS r ON r.pair_id = w.id AND r.step = :step
            WHERE w.id > :after AND (r.step IS NULL OR r.settings != :settings OR r.input != w.hash
                OR r.outcome = '{FAILED}')
            ORDER BY w.id"""
        for row in self._paged(query, step=step, settings=settings):
            yield Work(pair_of(row), row["text"] or "", row["hash"])

    def record(self, step: str, results: Iterable[Result]) -> None:
        """
        Writes results, each in place of the pair's earlier one of that step, and all to the history.

        They are on the disk when this returns; after a kill before that, none of them is.
        """
        with self.transaction() as connection:
            write_results(connection, step, results)

    def current(self, step: str) -> Iterator[tuple[Pair, Result]]:
        """
        The results of a step that are still valid: of pairs that reach it, and of the text that they reach it with.

        `Result.text` is `None` where the step passed on what it read; see `texts`.
        """
        query = f"""
            SELECT p.*, r.pair_id, r.settings, r.input, r.outcome, r.reason, r.text, r.details, r.at
            FROM ({incoming(step, self.config.repairs)}) AS w JOIN pairs AS p ON p.id = w.id
            JOIN results AS r ON r.pair_id = w.id AND r.step = :step AND r.input = w.hash
            WHERE w.id > :after ORDER BY w.id"""
        for row in self._paged(query, step=step):
            yield pair_of(row), result_of(row)

    def texts(self, step: str) -> Iterator[tuple[Pair, str]]:
        """Each pair that reaches a step, with its text."""
        query = f"""
            SELECT p.*, w.text FROM ({incoming(step, self.config.repairs)}) AS w
            JOIN pairs AS p ON p.id = w.id WHERE w.id > :after ORDER BY w.id"""
        for row in self._paged(query):
            yield pair_of(row), row["text"] or ""

    def accepted(self, unreviewed: bool = False) -> Iterator[tuple[Pair, str]]:
        """
        The pairs of the dataset, with the text that people accepted or wrote.

        Args:
            unreviewed: Whether to include what the filter kept and nobody has decided on.
        """
        for row in self._paged(accepted_pairs(self.config.repairs, unreviewed)):
            yield pair_of(row), row["text"]

    def skipped(self) -> list[dict[str, str]]:
        """Rows of the source that could not be used: `source`, `source_key`, `kind`, `reason`, `at`."""
        return [dict(row) for row in self._rows("SELECT * FROM skipped ORDER BY rowid")]

    def funnel(self) -> Funnel:
        """How many pairs reached each step, and their outcomes with reasons."""
        (sampled,) = self._rows("SELECT count(*) FROM pairs")[0]
        skipped = self._rows("SELECT kind, count(*) FROM skipped GROUP BY kind ORDER BY count(*) DESC, kind")
        accepted = self._rows(f"SELECT count(*) FROM ({accepted_pairs(self.config.repairs, False)})", after=0)
        return Funnel(
            wanted=self.config.wanted,
            sampled=sampled,
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

    def _rows(self, query: str, **values: object) -> list[sqlite3.Row]:
        with plain_errors(self.folder):
            return fetch(self.connection(), query, values).fetchall()

    def _paged(self, query: str, **values: object) -> Iterator[sqlite3.Row]:
        """The rows of a query on `id > :after`, in pages."""
        after = 0
        while rows := self._rows(f"{query} LIMIT {_PAGE}", after=after, **values):
            yield from rows
            after = rows[-1]["id"]


AnyProject: TypeAlias = ProjectStore[Any]


class Project(ProjectStore[CurationConfig]):
    """A curation project: images that a checkpoint describes, with copies of them in its folder."""

    settings_file = SETTINGS
    command, finish = "minigpt4 curate", "run"
    what, sampled = "caption", "sampled"
    step_words = {
        "generate": "described",
        "repair": "repaired",
        "filter": "through the filter",
        "review": "accepted by reviewers",
    }

    def prepare(self) -> None:
        self.images.mkdir(parents=True, exist_ok=True)

    def existing_images(self, images: Iterable[str]) -> set[str]:
        # One listing of the folder is faster than a check for each.
        there = {f"{IMAGES}/{name}" for name in os.listdir(self.images)} if self.images.is_dir() else set()
        return there.intersection(images)
