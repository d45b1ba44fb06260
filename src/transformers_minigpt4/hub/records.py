"""Reads the records in a checkpoint or dataset folder, and puts them in the words of a card."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from transformers_minigpt4.utils.file_names import RUN_FILE, SOURCES_FILE
from transformers_minigpt4.utils.files import JsonObject


Facts: TypeAlias = Mapping[str, Any]  # from JSON files that people may edit


def read_facts(folder: Path, name: str) -> JsonObject:
    """
    The JSON object in `folder/name`, or an empty one if there is no such file.

    Raises:
        ValueError: if the file is not a JSON object.
    """
    path = folder / name
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); repair or remove it") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} contains a {type(facts).__name__}, not a JSON object; repair or remove it")
    return facts


def read_run(folder: Path) -> JsonObject:
    """
    The `run.json` of a checkpoint as others may see it: without the command line, and folders by their last part.

    Raises:
        ValueError: as [`read_facts`].
    """
    run = read_facts(folder, RUN_FILE)
    return {key: _public(value) for key, value in run.items() if key != "command"}


def _public(value: object) -> Any:
    if isinstance(value, dict):
        return {_public(key): _public(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    return public_source(value) if isinstance(value, str) and ("/" in value or os.sep in value) else value


def public_source(source: str) -> str:
    """A source of rows with [`public_name`] for its path, without its folder of images; other texts as names."""
    kind, colon, path = source.partition(":")
    if not colon or path.startswith("//"):
        return public_name(source)
    if kind == "python":
        return source
    first, *options = path.split("::")
    kept = [option for option in options if not option.startswith("images=")]
    name = public_name(first) if kind in ("wds", "dataset") else Path(first).name  # others are never on the Hub
    return "::".join([f"{kind}:{name}", *kept])


def public_name(name: str) -> str:
    """The last part of a folder's name, since the rest is private; a Hub id or URL as it is."""
    local = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1 or os.path.exists(name)
    return Path(name).name if local and "://" not in name else name


def read_sources(folder: Path) -> list[JsonObject]:
    """
    The bases of a checkpoint, from `minigpt4_sources.json`.

    The record's `"sources"` is a list of objects or an object of objects by part. Each may have `part`, `id` (Hub id
    or path), `revision` (of a Hub id), `sha256` and `license`.

    Raises:
        ValueError: if the record has another format.
    """
    record = read_facts(folder, SOURCES_FILE).get("sources", [])
    if isinstance(record, Mapping):
        record = [{"part": part, **source} for part, source in record.items() if isinstance(source, Mapping)]
    if not isinstance(record, list) or not all(isinstance(source, dict) and source.get("id") for source in record):
        raise ValueError(f"{folder / SOURCES_FILE}: \"sources\" is not a list of objects that each have an 'id'")
    return record


def hub_ids(entries: Iterable[object]) -> list[str]:
    """Ids of those `entries` that are on the Hub, each once. A record without a revision may be of a local folder."""
    ids = [entry["id"] for entry in entries if isinstance(entry, Mapping) and _is_on_hub(entry)]
    return list(dict.fromkeys(ids))


def source_name(source: Facts) -> str:
    """A Hub id as it is; of a path only the last part, since the rest describes somebody's computer."""
    return str(source["id"]) if _is_on_hub(source) else Path(str(source["id"])).name


def _is_on_hub(source: Facts) -> bool:
    name = source.get("id")
    if not source.get("revision") or not isinstance(name, str) or "/" not in name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def table_row(name: str, record: Facts, *keys: str) -> dict[str, str]:
    return {"name": table_cell(name), **{key: table_cell(record.get(key)) for key in keys}}


def table_cell(value: object) -> str:
    """A value as one cell of a Markdown table."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{key}: {table_cell(entry)}" for key, entry in value.items())
    elif isinstance(value, (list, tuple)):
        value = ", ".join(table_cell(entry) for entry in value)
    return "" if value is None else " ".join(str(value).split()).replace("|", "\\|")


def run_facts(run: Facts) -> JsonObject:
    """What the templates show of a `run.json`, as text for tables; keys that are missing there are missing here."""
    if "changed_settings" in run:  # all of them are in run.json
        run = {**run, "recipe": run["changed_settings"]}
    facts: JsonObject = {
        key: table_cell(run[key])
        for key in ("stage", "seed", "git_revision", "source", "hardware", "review")
        if key in run
    }
    for key in ("recipe", "loss", "versions", "counts", "lost", "models", "prompts", "rules"):
        value = run.get(key)
        if isinstance(value, Mapping) and value:
            facts[key] = [(table_cell(name), table_cell(entry)) for name, entry in value.items()]
        elif isinstance(value, list) and value:
            facts[key] = [("", table_cell(entry)) for entry in value]
        elif value:
            facts[key] = [("", table_cell(value))]
    data = run.get("datasets") or []
    entries = [entry if isinstance(entry, Mapping) else {"id": entry} for entry in data]
    facts["datasets"] = [
        table_row(source_name(entry), entry, "revision", "rows", "sha256") for entry in entries if entry.get("id")
    ]
    return {key: value for key, value in facts.items() if value}


def evaluations_of(results: Facts, path: Path) -> Iterable[JsonObject]:
    """
    One row per metric of a `results.json`.

    It contains `{"tasks": {name: {"metrics": {metric: number}, …}}}`; a task may also have `dataset`, `split`,
    `revision`, `samples`, `primary` (the name of its first metric) and `intervals` (`{metric: [low, high]}`, 95 %).
    """
    if not results:
        return
    tasks = results.get("tasks")
    if not isinstance(tasks, Mapping) or not all(
        isinstance(task, Mapping) and isinstance(task.get("metrics"), Mapping) for task in tasks.values()
    ):
        raise ValueError(
            f'{path} has no "tasks" with "metrics"; it is not from `minigpt4 evaluate`, rename or remove it'
        )
    for name, task in tasks.items():
        metrics = sorted(task["metrics"].items(), key=lambda item: item[0] != task.get("primary"))
        for metric, value in metrics:
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"{path}: {metric} of {name} is {value!r}, not a number")
            interval = (task.get("intervals") or {}).get(metric)
            yield {
                "task": table_cell(name),
                "dataset": table_cell(task.get("dataset") or name),
                "split": task.get("split"),
                "revision": task.get("revision"),
                "metric": table_cell(metric),
                "value": value,
                "interval": f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "",
                "samples": table_cell((task.get("questions") or {}).get(metric, task.get("samples"))),
            }
