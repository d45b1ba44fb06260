"""The tasks by name; each module is imported when its task is asked for."""

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..evaluator import Task


# name: (module of this folder, class of a Task); docs/reference/tasks.md has a section on each.
TASKS: dict[str, tuple[str, str]] = {
    "advanced": ("advanced", "Advanced"),
    "coco_coverage": ("coco_coverage", "CocoCoverage"),
    "stage2_failures": ("stage2_failures", "Stage2Failures"),
    "aokvqa": ("aokvqa", "AOKVQA"),
    "gqa": ("gqa", "GQA"),
    "chair": ("chair", "CHAIR"),
    "scienceqa": ("scienceqa", "ScienceQA"),
    "scienceqa_short": ("scienceqa", "ScienceQAShort"),
    "llava_bench": ("llava_bench", "LLaVABench"),
    "pope": ("pope", "POPE"),
    "captions": ("captions", "Captions"),
}


def check_names(names: Iterable[str]) -> None:
    """
    Refuse unknown tasks.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    for name in names:
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")


def load_task(name: str) -> "Task":
    """
    Create a task.

    Raises:
        ValueError: as of [`check_names`].
    """
    check_names([name])
    module, kind = TASKS[name]
    task: Task = getattr(import_module(f".{module}", __name__), kind)()
    return task
