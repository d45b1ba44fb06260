"""
Plays the person in the toy world's curation.

    python -m transformers_minigpt4.demo.reviewer EXPORT.csv DECISIONS.csv

Nobody looks at these images. The program reads from each image's key what was drawn, and decides by rule what a
careful person would: it accepts correct texts, edits those that need little, and rejects the rest. In a real curation
people do this, on the page of `minigpt4 curate review` or in the exported file.
"""

import csv
import os
import re
import sys
from collections import Counter

from transformers_minigpt4.utils.files import atomic_file
from transformers_minigpt4.utils.text import from_spreadsheet_cell

from .scoring import failure, named_values, right_attributes
from .world import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Scene


REVIEWER = "demo reviewer"
COLUMNS_OUT = ("pair", "text_id", "action", "text", "reviewer")

_PLACE = re.compile(rf"\b(?:(?:{'|'.join(ROWS)}) (?:{'|'.join(COLUMNS)})|center)\b", re.IGNORECASE)
_VALUES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}


def shown_scene(key: str) -> Scene:
    """
    What the image with this key shows: the key has size, colour, shape and place as words, in any order.

    Raises:
        ValueError: when the key does not name each of them once.
    """
    words = re.findall(r"[a-z]+", key.lower())
    found = {name: [word for word in words if word in values] for name, values in _VALUES.items()}
    rows = [word for word in words if word in ROWS]
    columns = [word for word in words if word in COLUMNS]
    if not rows and columns == ["center"]:
        rows = ["middle"]
    if any(len(values) != 1 for values in (*found.values(), rows, columns)):
        raise ValueError(
            f"the key {key!r} does not say what the image shows; this reviewer only knows images of the toy world, "
            "whose keys look like 0007-large-red-circle-top-left"
        )
    return Scene(found["colour"][0], found["shape"][0], found["size"][0], rows[0], columns[0])


def judge(text: str, scene: Scene) -> tuple[str, str]:
    """
    What a careful person decides about a description.

    Args:
        text: The description.
        scene: What the image shows.

    Returns:
        The action and its text: `("accept", "")` where all four attributes are right and the text did not fail;
        `("edit", new text)` where leaving out sentences and correcting one value makes it so; `("reject", "")` for the
        rest.
    """
    if _is_right(text, scene):
        return "accept", ""
    if failure(text, scene) != "off-topic":
        edited = _put_right(_whole_sentences(text), scene)
        if _is_right(edited, scene):
            return "edit", edited
    return "reject", ""


def _is_right(text: str, scene: Scene) -> bool:
    return failure(text, scene) is None and all(right_attributes(text, scene).values())


def _whole_sentences(text: str) -> str:
    """Without repeated sentences and without an unfinished end."""
    sentences = [" ".join(sentence.split()) for sentence in re.findall(r"[^.!?]+[.!?]", text)]
    return " ".join(dict.fromkeys(sentences))


def _put_right(text: str, scene: Scene) -> str:
    """With the one wrong attribute corrected; a text with more wrong ones is left unchanged."""
    wrong = [attribute for attribute, right in right_attributes(text, scene).items() if not right]
    if len(wrong) != 1 or not named_values(text)[wrong[0]]:
        return text
    (attribute,) = wrong
    value = getattr(scene, attribute)
    pattern = _PLACE if attribute == "place" else re.compile(rf"\b(?:{'|'.join(_VALUES[attribute])})\b", re.IGNORECASE)
    text = pattern.sub(value, text)
    text = re.sub(r"\b([Aa])n?(?= orange\b)", r"\1n", text)
    return re.sub(rf"\b([Aa])n(?= (?:{'|'.join(set(COLOURS) - {'orange'})})\b)", r"\1", text)


def review(export: str | os.PathLike, decisions: str | os.PathLike) -> Counter[str]:
    """
    Reads pairs that `minigpt4 curate review --export` wrote and writes decisions for `--import`.

    Args:
        export: CSV with the columns `pair`, `text_id` and `text_after`.
        decisions: CSV with the columns `pair`, `text_id`, `action`, `text` and `reviewer`.

    Returns:
        `Counter`: pairs for each action.

    Raises:
        ValueError: when the export lacks a column, or a key does not say what its image shows.
        OSError: when a file cannot be read or written.
    """
    with open(export, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        missing = {"pair", "text_id", "text_after"} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{str(export)!r} has no column {', '.join(sorted(missing))}; export the pairs as CSV")
    counts: Counter[str] = Counter()
    with atomic_file(decisions) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS_OUT)
        writer.writeheader()
        for row in rows:
            action, text = judge(from_spreadsheet_cell(row["text_after"]), shown_scene(row["pair"]))
            counts[action] += 1
            writer.writerow(dict(zip(COLUMNS_OUT, (row["pair"], row["text_id"], action, text, REVIEWER))))
    return counts


def main(arguments: list[str]) -> None:
    """The command; on an error it exits with one line."""
    if len(arguments) != 2:
        sys.exit("usage: python -m transformers_minigpt4.demo.reviewer EXPORT.csv DECISIONS.csv")
    try:
        counts = review(*arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"reviewer: {error}")
    summary = ", ".join(f"{counts[action]} to {action}" for action in ("accept", "edit", "reject"))
    print(f"{sum(counts.values())} pairs decided by rule, no person involved: {summary}; written to {arguments[1]}")


if __name__ == "__main__":
    main(sys.argv[1:])
