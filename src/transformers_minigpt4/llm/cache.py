"""Answers of chat models on disk, found by the content of the question, so that running again costs nothing."""

import sqlite3
import threading
from datetime import UTC, datetime
from pathlib import Path

from .types import ChatAnswer, Usage


_SCHEMA_VERSION = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS answers(
    digest TEXT PRIMARY KEY,
    text TEXT NOT NULL,
    finish_reason TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cost REAL NOT NULL,
    at TEXT NOT NULL
)
"""
_BUSY_SECONDS = 60.0  # writes take milliseconds; a longer wait means that a process hangs


class AnswerCache:
    """
    A SQLite file of answers, shared by threads and by processes. An answer is on disk when `put` returns.

    Args:
        path: The file; it and its folder are created if they do not exist.

    Raises:
        ValueError: if the file is not such a cache, or one of a later version.
        OSError: if it cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Autocommit: each answer is one transaction.
            self._connection = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise OSError(f"cannot open the cache of answers {str(self.path)!r}: {error}; check the path") from error
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self._connection.close()
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(f"cannot write the cache of answers {str(self.path)!r}: {error}") from error
            raise ValueError(
                f"{str(self.path)!r} is not a cache of answers ({error}); delete it, or choose another file"
            ) from error
        except ValueError:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        execute = self._connection.execute
        # With the write lock first: of two processes that switch to WAL at once, one fails with "database is locked".
        if execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            execute("BEGIN IMMEDIATE")
            execute("COMMIT")
            execute("PRAGMA journal_mode = WAL")
        version = execute("PRAGMA user_version").fetchone()[0]
        if version > _SCHEMA_VERSION:
            raise ValueError(
                f"the cache of answers {str(self.path)!r} was made by a later version of this package "
                f"(format {version}, here {_SCHEMA_VERSION}); upgrade, or choose another file"
            )
        execute(_TABLE)
        execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def get(self, digest: str) -> ChatAnswer | None:
        """The answer stored under a digest, or `None`."""
        with self._lock:
            row = self._connection.execute(
                "SELECT text, finish_reason, prompt_tokens, completion_tokens, cost FROM answers WHERE digest = ?",
                (digest,),
            ).fetchone()
        if row is None:
            return None
        received, finish_reason, prompt_tokens, completion_tokens, cost = row
        return ChatAnswer(received.strip(), finish_reason, prompt_tokens, completion_tokens, cost, received=received)

    def put(self, digest: str, answer: ChatAnswer) -> None:
        """
        Stores an answer; if another process was quicker, its answer stays.

        Raises:
            OSError: if it cannot be written, for instance on a full disk.
        """
        text = answer.text if answer.received is None else answer.received
        row = (digest, text, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens, answer.cost)
        with self._lock:
            try:
                self._connection.execute(
                    "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*row, datetime.now(UTC).isoformat(timespec="seconds")),
                )
            except sqlite3.OperationalError as error:
                raise OSError(
                    f"cannot store an answer in {str(self.path)!r}: {error}; free some space and run again"
                ) from error

    def position(self) -> int:
        """Where the cache ends now, for [`since`]."""
        with self._lock:
            (last,) = self._connection.execute("SELECT coalesce(max(rowid), 0) FROM answers").fetchone()
        return int(last)

    def since(self, position: int) -> Usage:
        """What the answers that were stored after a [`position`] have used, by whichever process."""
        columns = "count(*), total(prompt_tokens), total(completion_tokens), total(cost)"
        with self._lock:
            row = self._connection.execute(f"SELECT {columns} FROM answers WHERE rowid > ?", (position,)).fetchone()
        return Usage(int(row[0]), 0, int(row[1]), int(row[2]), row[3])

    def close(self) -> None:
        with self._lock:
            self._connection.close()
