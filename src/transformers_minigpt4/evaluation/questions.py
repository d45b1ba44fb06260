"""Finds the data of a task, in a folder or on the Hub, and reads its questions."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import huggingface_hub

from transformers_minigpt4.utils.text import first_line

from .evaluator import Question, Task


HUB = "hub:"  # datasets on the Hub, as hub:namespace/name[@revision]
DataSources: TypeAlias = "str | Path | Mapping[str, str | Path]"


def load_questions(
    task: Task, data: DataSources, limit: int | None = None
) -> tuple[list[Question], tuple[str, str | None]]:
    """
    A task's questions, with the name and the Hub revision of their data.

    Args:
        task: Reads the files.
        data: As for [`~evaluation.run.evaluate`].
        limit: Maximum number of questions; the first ones are read.

    Raises:
        ValueError: if the data is missing or wrong, holds no question, or one id twice.
    """
    path, name, revision = _find_data(task.name, data)
    questions = task.questions(path, limit)
    if not questions:
        raise ValueError(f"{str(path)!r} holds no question for the task {task.name!r}; check the path")
    twice = [id_ for id_, count in Counter(question.id for question in questions).items() if count > 1]
    if twice:
        raise ValueError(
            f"{str(path)!r} holds the id {twice[0]!r} twice for the task {task.name!r} ({len(twice)} such ids); fetch "
            "the official file again"
        )
    return questions, (name, revision)


def _find_data(task: str, data: DataSources) -> tuple[Path, str, str | None]:
    if isinstance(data, Mapping):
        if task not in data:
            raise ValueError(f"no data is named for the task {task!r}; give --data {task}=PATH or --data FOLDER")
        source = data[task]
    else:
        source = data
    if str(source).startswith(HUB):
        return _download(*str(source).removeprefix(HUB).partition("@")[::2])
    path = Path(source)
    if not isinstance(data, Mapping) and (path / task).exists():
        path = path / task
    if not path.exists():
        raise ValueError(f"there is no data for the task {task!r} at {str(path)!r}; check --data")
    return path, path.name, None


def _download(name: str, revision: str) -> tuple[Path, str, str]:
    try:
        path = Path(huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision or None))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot get the dataset {name!r} from the Hub: {first_line(error)}; check name and revision, or log in "
            "with `hf auth login`"
        ) from error
    return path, name, path.name  # a snapshot's folder is named by its commit
