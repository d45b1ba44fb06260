"""The review without a page: pairs into a CSV or JSONL file, and people's decisions back from one."""

import csv
import os
import sqlite3
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from transformers_minigpt4.utils.files import PathLike, atomic_file, to_json
from transformers_minigpt4.utils.json_files import json_lines
from transformers_minigpt4.utils.text import from_spreadsheet_cell, spreadsheet_cell
from transformers_minigpt4.web.html import person_name

from .decisions import add_decision, check_action, clean_reason, live_decision, same_text, take_back
from .review import ReviewPair, ReviewQueue
from .settings_file import CurationError
from .store import AnyProject


# What is exported; reviewers fill in the last four. An import needs `pair`, `text_id` and `action`.
FIELDS = ("pair", "image", "text_before", "text_after", "flag", "text_id", "action", "text", "reason", "reviewer")
_NEEDED = ("pair", "text_id", "action")
_ACTIONS = {"accept": "accepted", "edit": "edited", "reject": "rejected"}
# A spreadsheet would take a digest of digits only, or of digits and one e, for a number.
_ID = "text-"


@dataclass(frozen=True)
class Export:
    """How many pairs a file holds, and the keys of those left out because their image is missing."""

    pairs: int
    missing: list[str]


@dataclass(frozen=True)
class Import:
    """Decisions that an import added, by action; those that were known already; and rows without an action."""

    accepted: int = 0
    edited: int = 0
    rejected: int = 0
    known: int = 0
    undecided: int = 0

    @property
    def added(self) -> int:
        return self.accepted + self.edited + self.rejected


def export_pairs(project: AnyProject, path: PathLike, reviewer: str | None = None, decided: bool = False) -> Export:
    """
    Writes the pairs that need a decision, or the decisions made so far.

    Args:
        project: The project.
        path: A `.csv` or `.jsonl` file; an older one is replaced. The images' paths in it are relative to the
            project's folder. `flag` says why the repair asks people to look closely.
        reviewer: Leaves out what this person has decided on; with `decided`, what others have.
        decided: Writes the decisions on the current texts, a row for each.

    Raises:
        CurationError: for another kind of file, or a folder that does not exist.
        OSError: if the file cannot be written.
    """
    kind = _kind(path)
    if not Path(path).absolute().parent.is_dir():
        raise CurationError(f"there is no folder for {os.fspath(path)}; create it, or choose another one")
    queue, missing = ReviewQueue(project), list[str]()
    if decided:
        rows = [_row(pair, *_said(decision)) for pair, decision in queue.decided(reviewer)]
    else:
        pairs, missing = queue.due(reviewer)
        name = person_name(reviewer) if reviewer is not None else ""
        rows = [_row(pair, "", "", "", name) for pair in pairs]
    with atomic_file(path) as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows({field: spreadsheet_cell(value) for field, value in row.items()} for row in rows)
        else:
            file.writelines(to_json(row) + "\n" for row in rows)
    return Export(len(rows), missing)


def _row(pair: ReviewPair, action: str, text: str, reason: str, reviewer: str) -> dict[str, str]:
    shown = (pair.key, pair.image, pair.before, pair.after, pair.flag, _ID + pair.text_id)
    return dict(zip(FIELDS, (*shown, action, text, reason, reviewer), strict=True))


def _said(decision: sqlite3.Row) -> tuple[str, str, str, str]:
    action = next(word for word, action in _ACTIONS.items() if action == decision["action"])
    return action, decision["text"] or "", decision["reason"], decision["reviewer"]


def import_decisions(project: AnyProject, path: PathLike, reviewer: str | None = None) -> Import:
    """
    Imports the decisions of a file: all of them, or none.

    Rows without an action are skipped, so a file may be imported half done, and again later. A row that differs from
    what the same person decided on the same text before replaces that decision.

    Args:
        project: The project.
        path: A `.csv` or `.jsonl` file with `pair`, `text_id`, `action` (accept, edit or reject), for edits `text`,
            for rejected ones `reason` (may be empty), and `reviewer`; other fields are ignored.
        reviewer: Who decided, for rows that do not say.

    Raises:
        CurationError: if there is no such file, or a line cannot be imported, with the number of the first one: an
            unknown pair or action, a repeated pair, an edit without text, a text that has changed since the export,
            or no reviewer.
        OSError: if the file cannot be read.
    """
    queue = ReviewQueue(project)
    counts = {"accepted": 0, "edited": 0, "rejected": 0, "known": 0, "undecided": 0}
    seen: dict[tuple[str, str], int] = {}
    with project.transaction() as connection:
        for line, row in _read(path):
            try:
                counts[_import_row(queue, connection, row, reviewer, line, seen)] += 1
            except ValueError as error:
                raise CurationError(f"line {line} of {os.fspath(path)}: {error}; nothing was imported") from error
    return Import(**counts)


def _import_row(
    queue: ReviewQueue,
    connection: sqlite3.Connection,
    row: dict[str, str],
    reviewer: str | None,
    line: int,
    seen: dict[tuple[str, str], int],
) -> str:
    """Writes one row's decision; returns what it counts as."""
    said, key, text = row["action"].strip().lower(), row["pair"].strip(), row.get("text", "").strip()
    reason = clean_reason(row.get("reason", ""))
    if not said:
        return "undecided"
    action = _ACTIONS.get(said, said)
    if action not in _ACTIONS.values():
        raise ValueError(f"{said!r} is not an action; write accept, edit or reject, or leave it empty")
    check_action(action, text)
    if action == "edited":
        queue.project.check_edit(text)
    name = row.get("reviewer", "").strip() or reviewer
    if name is None:
        raise ValueError("it does not say who decided; fill in `reviewer`, or name one for the complete file")
    me = person_name(name)
    if seen.setdefault((me, key), line) != line:
        raise ValueError(f"{me} decides on pair {key!r} here and in line {seen[me, key]}; keep one")
    found = connection.execute("SELECT id FROM pairs WHERE key = ?", (key,)).fetchone()
    if found is None:
        raise ValueError(f"there is no pair {key!r} in this project; was it exported from another one?")
    current = queue.current(connection, found[0])
    if current is None:
        raise ValueError(
            f"pair {key!r} is not due for review any more, since the filter has dropped it; remove the line"
        )
    text_id = row["text_id"].strip().removeprefix(_ID)
    if text_id != current["text_id"]:
        raise ValueError(f"the text of pair {key!r} has changed since the export; export it again and decide on that")
    if action != "edited" and text and not same_text(text, current["after"]):
        raise ValueError(f"pair {key!r} has action {said} and a text; write edit, or leave the text empty")
    if action != "rejected" and reason:
        raise ValueError(f"pair {key!r} has action {said} and a reason; leave it empty, it is for reject")
    if action == "edited" and same_text(text, current["after"]):
        action = "accepted"
    earlier = live_decision(connection, current["id"], me, text_id)
    if earlier is not None:
        before = earlier["action"], earlier["text"] or "", earlier["reason"]
        if before == (action, text if action == "edited" else "", reason):
            return "known"
        take_back(connection, earlier)
    add_decision(connection, current["id"], me, text_id, action, text, current, reason)
    return action


def _read(path: PathLike) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a file with the number of the line that each begins on."""
    kind = _kind(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise CurationError(f"{os.fspath(path)} is not a regular file; give the file that the export wrote")
    try:
        if kind == "jsonl":
            yield from _read_jsonl(path)
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from _read_csv(file, path)
    except FileNotFoundError:
        raise CurationError(f"there is no file {os.fspath(path)}; write one with --export first") from None
    except UnicodeDecodeError as error:
        raise CurationError(f"{os.fspath(path)} is not UTF-8; save it as `CSV UTF-8`") from error


def _read_csv(file: TextIO, path: PathLike) -> Iterator[tuple[int, dict[str, str]]]:
    # Spreadsheets of many locales separate by semicolons.
    header = file.readline()
    file.seek(0)
    reader = csv.reader(file, delimiter=max(",;\t", key=header.count), strict=True)
    try:
        names = next(reader, [])
        _need(names, path, 1)
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(names):
                raise CurationError(
                    f"line {line} of {os.fspath(path)} has {len(cells)} cells under {len(names)} names; nothing was "
                    "imported"
                )
            if cells:
                yield line, {name: from_spreadsheet_cell(cell) for name, cell in zip(names, cells)}
            line = reader.line_num + 1
    except csv.Error as error:
        raise CurationError(f"line {reader.line_num} of {os.fspath(path)} is not CSV: {error}") from error


def _read_jsonl(path: PathLike) -> Iterator[tuple[int, dict[str, str]]]:
    for number, row in json_lines(path):
        if isinstance(row, ValueError):
            raise CurationError(f"line {number} of {os.fspath(path)} cannot be read: {row}; nothing was imported")
        if not isinstance(row, dict) or not all(isinstance(value, str | None) for value in row.values()):
            raise CurationError(f"line {number} of {os.fspath(path)} is not an object of texts; nothing was imported")
        row = {name: value or "" for name, value in row.items()}
        _need(row, path, number)
        yield number, row


def _need(names: Collection[str], path: PathLike, line: int) -> None:
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise CurationError(
            f"line {line} of {os.fspath(path)} has no {', '.join(missing)}; keep the fields that the export wrote"
        )


def _kind(path: PathLike) -> str:
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("csv", "jsonl"):
        raise CurationError(f"{os.fspath(path)} is neither .csv nor .jsonl; choose one of these")
    return kind
