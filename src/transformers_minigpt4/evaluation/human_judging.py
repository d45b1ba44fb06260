"""People as judges of the task `advanced`: a blind, shuffled sheet of answers, their decisions, and the counts."""

import csv
import hashlib
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

from transformers_minigpt4.utils.files import JsonLinesWriter, atomic_file, write_json
from transformers_minigpt4.utils.json_files import parse_json
from transformers_minigpt4.utils.text import spreadsheet_cell
from transformers_minigpt4.web.html import person_name

from .answering import AnswerStore
from .evaluator import Question, read_json, read_json_lines
from .results import ANSWERS, TaskResults, read_results, summarize, write_results
from .tasks import load_task
from .tasks.advanced import verdict_columns


TASK = "advanced"
SHEET, DECISIONS, IMAGES = "sheet.json", "decisions.jsonl", "images"
_YES, _NO = frozenset({"yes", "y", "1", "true"}), frozenset({"no", "n", "0", "false"})
_CSV_COLUMNS = ("item", "task", "prompt", "image", "answer", "success")


@dataclass(frozen=True)
class Item:
    """
    One answer to judge.

    `id` and `image` say nothing about the model, which nobody who judges gets to see. `answer` is `None` if the
    model could not answer; such an item is not judged and does not count as a success.
    """

    id: str
    model: str
    question: str
    task: str
    prompt: str
    image: str
    answer: str | None


class SheetContent(TypedDict):
    """What `sheet.json` holds; `runs` are paths relative to the sheet, by model."""

    seed: int
    fingerprint: str
    runs: dict[str, str]
    items: list[dict[str, str | None]]


class TaskCounts(TypedDict):
    """Answers to one task of the paper's table: successes, judged ones, those without a majority, and all."""

    success: int
    judged: int
    undecided: int
    answers: int


class Counts(TypedDict):
    """
    What people decided.

    `models`: by model and task; `verdicts`: by model and question whether it is a success, or `None`; `people`: their
    numbers of decisions; `agreement`: the share of answers with several judges about which all say the same (`None`
    if there are none).
    """

    models: dict[str, dict[str, TaskCounts]]
    verdicts: dict[str, dict[str, bool | None]]
    people: dict[str, int]
    agreement: float | None


class Sheet:
    """
    A folder with the answers of several models in random order, their images, and what people decided.

    Every decision is a line of `decisions.jsonl` and on the disk before the next item is shown; a person's last
    decision about an item counts. Several people may judge the same sheet, each at their own pace.

    Args:
        folder: A folder created by [`make_sheet`].

    Raises:
        ValueError: if there is no sheet, or one of its files is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / SHEET).is_file():
            raise ValueError(f"there is no sheet in {str(folder)!r}; create one with `minigpt4 evaluate people make`")
        self.content: SheetContent = read_json(folder / SHEET)
        self.items: list[Item] = [Item(**row) for row in self.content["items"]]
        self.asked = [item for item in self.items if item.answer is not None]
        self._by_id = {item.id: item for item in self.asked}
        self._lock = threading.Lock()  # the page answers in threads

    def item(self, key: str) -> Item:
        """
        The item of an id.

        Raises:
            ValueError: if there is none.
        """
        if key not in self._by_id:
            raise ValueError(
                f"the sheet in {str(self.folder)!r} has no item {key!r}; does it belong to another sheet?"
            )
        return self._by_id[key]

    def decisions(self) -> dict[str, dict[str, bool]]:
        """By person, then by item id, in the order of the decisions; a line cut short by a crash does not count."""
        path = self.folder / DECISIONS
        found: dict[str, dict[str, bool]] = {}
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            if line.endswith(b"\n") and line.strip():
                try:
                    row = parse_json(line)
                    person = found.setdefault(row["person"], {})
                    person.pop(row["item"], None)
                    person[row["item"]] = row["success"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{str(path)!r} has a line that is not a decision: {line[:80]!r}") from error
        return found

    def decide(self, key: str, person: str, success: bool) -> None:
        """
        Write a decision; a later one of the same person about the same item replaces it.

        Raises:
            ValueError: for an unknown item, or an empty name.
        """
        self.decide_all(person, [(key, success)])

    def decide_all(self, person: str, decisions: Iterable[tuple[str, bool]]) -> None:
        """Write several decisions at once; all of them or none, see [`decide`]."""
        name, at = person_name(person), datetime.now(UTC).isoformat(timespec="seconds")
        rows = [
            {"item": self.item(key).id, "person": name, "success": bool(success), "at": at}
            for key, success in decisions
        ]
        # A line without line break was never confirmed to anybody.
        with self._lock, JsonLinesWriter(self.folder / DECISIONS, is_cut=lambda line: True) as file:
            file.append(rows)

    def next_for(self, person: str) -> Item | None:
        """The first item that a person has not decided on; `None` at the end."""
        done = self.decisions().get(person, {})
        return next((item for item in self.asked if item.id not in done), None)


def make_sheet(runs: Sequence[Path], output: Path, seed: int = 0) -> Sheet:
    """
    Put the answers of several runs of `advanced` into one shuffled sheet.

    Args:
        runs: Output folders of `minigpt4 evaluate ... --tasks advanced`, one per model, over the same images.
        output: A new folder.
        seed: Draws the order.

    Raises:
        ValueError: if a run lacks the task, two runs are about different questions or have the same name, or `output`
            is not empty.
        OSError: if an image cannot be copied.
    """
    if not runs:
        raise ValueError("name at least one folder of results")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{str(output)!r} is not empty; choose a new folder for the sheet")
    names = _names(runs)
    fingerprints, items = {}, []
    files: dict[str, str] = {}
    for name, run in names.items():
        results = read_results(run)
        if TASK not in results["tasks"]:
            raise ValueError(f"{str(run)!r} has no results of {TASK}; evaluate with --tasks {TASK} first")
        fingerprints[name] = results["tasks"][TASK]["fingerprint"]
        for row in read_json_lines(run / "answers" / f"{TASK}.jsonl"):
            image = files.setdefault(row["images"][0], f"{len(files):03d}{Path(row['images'][0]).suffix.lower()}")
            key = hashlib.sha256(f"{seed} {name} {row['id']}".encode()).hexdigest()[:12]
            items.append(Item(key, name, row["id"], row["record"]["task"], row["prompt"], image, row.get("answer")))
    if len(set(fingerprints.values())) > 1:
        raise ValueError(
            f"{' and '.join(names)} were asked about different questions or images; evaluate them on one folder"
        )
    random.Random(seed).shuffle(items)
    shown = {item.image for item in items if item.answer is not None}
    lost = [source for source, image in files.items() if image in shown and not Path(source).is_file()]
    if lost:
        raise ValueError(f"the image {lost[0]!r} has moved since the evaluation; put it back or evaluate again")
    (output / IMAGES).mkdir(parents=True)
    for source, image in files.items():
        if image in shown:
            shutil.copyfile(source, output / IMAGES / image)
    content: SheetContent = {
        "seed": seed,
        "fingerprint": next(iter(fingerprints.values())),
        "runs": {name: os.path.relpath(run.resolve(), output.resolve()) for name, run in names.items()},
        "items": [vars(item) for item in items],
    }
    write_json(output / SHEET, content)
    return Sheet(output)


def _names(runs: Sequence[Path]) -> dict[str, Path]:
    """A name for each run: its checkpoint's, or the folder's where two have the same."""
    ids = [read_results(run)["checkpoint"]["id"] for run in runs]
    names = ids if len(set(ids)) == len(ids) else [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"two of the runs are named {Counter(names).most_common(1)[0][0]!r}; rename a folder")
    return dict(zip(names, runs))


def export_csv(sheet: Sheet, path: Path, person: str | None = None) -> int:
    """
    Write the sheet, without the models' names, as a table to fill in instead of using the page.

    Args:
        sheet: What to judge.
        path: CSV file in UTF-8; the column `success` is empty, or holds what `person` has decided so far.
        person: Whose decisions to include.

    Returns:
        The number of rows.
    """
    decided = sheet.decisions().get(person or "", {})
    with atomic_file(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_CSV_COLUMNS)
        for item in sheet.asked:
            success = {True: "yes", False: "no", None: ""}[decided.get(item.id)]
            image, answer = f"{IMAGES}/{item.image}", item.answer or ""
            writer.writerow([item.id, item.task, item.prompt, image, spreadsheet_cell(answer), success])
    return len(sheet.asked)


def import_csv(sheet: Sheet, path: Path, person: str) -> int:
    """
    Import the decisions of a filled-in table.

    Args:
        sheet: What was judged.
        path: CSV file with the columns `item` and `success` (yes or no; an empty one is not decided).
        person: Whose decisions these are.

    Returns:
        The number of decisions.

    Raises:
        ValueError: for another table, an unknown item, a repeated item, or a word other than yes and no; nothing is
            imported then.
    """
    decisions: dict[str, bool] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"item", "success"} - set(reader.fieldnames or ()):
            raise ValueError(f"{str(path)!r} has no column {sorted(missing)[0]!r}; export the sheet and fill that in")
        for number, row in enumerate(reader, start=2):
            key, word = (row["item"] or "").strip(), (row["success"] or "").strip().lower()
            if word and word not in _YES | _NO:
                raise ValueError(f"row {number} of {str(path)!r} says {word!r}; write yes or no, or leave it empty")
            if key in decisions:
                raise ValueError(f"row {number} of {str(path)!r} repeats the item {key!r}; keep one of the rows")
            if word:
                decisions[sheet.item(key).id] = word in _YES
    sheet.decide_all(person, decisions.items())
    return len(decisions)


def count(sheet: Sheet) -> Counts:
    """
    Success counts by model and task, in the manner of the paper's Table 1.

    An answer is a success when more than half of the people who judged it say so; one that nobody judged, or about
    which they are split evenly, counts as undecided. A missing answer is not a success.
    """
    decisions = sheet.decisions()
    verdicts: dict[str, dict[str, bool | None]] = {}
    models: dict[str, dict[str, TaskCounts]] = {}
    shared = agreed = 0
    for item in sheet.items:
        said = [person[item.id] for person in decisions.values() if item.id in person]
        if len(said) > 1:
            shared, agreed = shared + 1, agreed + (len(set(said)) == 1)
        verdict: bool | None = None
        if item.answer is None:
            verdict = False
        elif 2 * sum(said) != len(said):
            verdict = 2 * sum(said) > len(said)
        verdicts.setdefault(item.model, {})[item.question] = verdict
        none: TaskCounts = {"success": 0, "judged": 0, "undecided": 0, "answers": 0}
        counter = models.setdefault(item.model, {}).setdefault(item.task, none)
        counter["answers"] += 1
        counter["undecided" if verdict is None else "judged"] += 1
        counter["success"] += verdict is True
    return {
        "models": {name: dict(sorted(tasks.items())) for name, tasks in sorted(models.items())},
        "verdicts": verdicts,
        "people": {name: len(person) for name, person in sorted(decisions.items())},
        "agreement": agreed / shared if shared else None,
    }


def write_verdicts(sheet: Sheet) -> list[Path]:
    """
    Write the people's verdicts into the results of the sheet's runs, replacing those of a judge.

    Returns:
        The runs' folders.

    Raises:
        ValueError: if a run is gone or its answers differ from the sheet's.
    """
    verdicts, task, changed = count(sheet)["verdicts"], load_task(TASK), []
    asked = {(item.model, item.question): item.answer for item in sheet.items}
    for name, folder in ((name, (sheet.folder / run).resolve()) for name, run in sheet.content["runs"].items()):
        results = read_results(folder)
        entry: TaskResults = results["tasks"].get(TASK, {})
        lines = read_json_lines(folder / ANSWERS / f"{TASK}.jsonl")
        if entry.get("fingerprint") != sheet.content["fingerprint"] or any(
            asked.get((name, line["id"]), "?") != line.get("answer") for line in lines
        ):
            raise ValueError(f"{str(folder)!r} has other answers than the sheet; make a new sheet")
        questions, records = [], []
        for line in lines:
            line["record"] |= verdict_columns(verdicts[name][line["id"]])
            line["record"] |= {"unreadable": None, "judge": "people"}
            groups = {"task": line["record"]["task"]}
            questions.append(Question(line["id"], line["prompt"], (), line["reference"], groups))
            records.append(line["record"])
        AnswerStore(folder / ANSWERS, TASK).finish(lines)
        entry = entry | summarize(task, questions, records)
        entry["judge"] = {"people": len(sheet.decisions())}
        results["tasks"][TASK] = entry
        write_results(folder, results["checkpoint"], results["tasks"])
        changed.append(folder)
    return changed
