"""The commands that continue where a run stopped, or that come after it."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from .recipe_files import recipe_names


RESUME = ("--resume-from-checkpoint", "true")


def resume_command(words: Sequence[str], program: str = "minigpt4 train") -> str:
    """
    The command that resumes a run from its last checkpoint, or starts it again if it has none.

    Args:
        words (`Sequence[str]`): What followed `program` on the command line of the run.
        program (`str`, *optional*): How runs are started.
    """
    kept: list[str] = []
    value_follows = False
    for word in words:
        option, equals, _ = word.partition("=")
        if option.replace("_", "-") == RESUME[0]:
            value_follows = not equals
        elif not value_follows or word.startswith("--"):
            kept.append(word)
            value_follows = False
        else:
            value_follows = False
    return f"{program} {shlex.join([*kept, *RESUME])}"


def commands_after(recipe: str | None, prompt_format: str, output: str) -> list[str]:
    """
    What to run after a run is complete: the next stage if there is one, and what uses the checkpoint.

    Args:
        recipe (`str`, *optional*): Name or file of the recipe, as it was given.
        prompt_format (`str`): The recipe's; that of stage 1 says that a stage 2 can follow.
        output (`str`): Folder of the checkpoint.
    """
    folder = shlex.quote(output)
    use = [f"minigpt4 describe IMAGE --model {folder}"]
    later = _stage_2(Path(recipe or "").stem, prompt_format)
    if later is not None:
        return [f"minigpt4 train {later} --model {folder}", *use]
    return [
        *use,
        f"minigpt4 evaluate {folder} --tasks gqa,chair --data DATA",
        f"minigpt4 push {folder} NAMESPACE/NAME",
    ]


def _stage_2(recipe: str, prompt_format: str) -> str | None:
    """The package's recipe that follows another one; for a recipe that is not the package's, the paper's stage 2."""
    known = recipe_names()
    for name in (re.sub(r"_stage1.*", "_stage2", recipe), f"{recipe}_stage2"):
        if name != recipe and name in known:
            return name
    return "minigpt4_stage2" if prompt_format == "stage1" else None
