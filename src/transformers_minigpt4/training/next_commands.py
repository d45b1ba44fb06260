"""The commands that come after a run."""

import re
import shlex
from pathlib import Path

from transformers_minigpt4.hub.checkpoints import has_local_base

from .recipe_files import recipe_names


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
        f"minigpt4 push {folder} NAMESPACE/NAME" + (" --merge" if has_local_base(Path(output)) else ""),
    ]


def _stage_2(recipe: str, prompt_format: str) -> str | None:
    """The package's recipe that follows another one; for a recipe that is not the package's, the paper's stage 2."""
    known = recipe_names()
    for name in (re.sub(r"_stage1.*", "_stage2", recipe), f"{recipe}_stage2"):
        if name != recipe and name in known:
            return name
    return "minigpt4_stage2" if prompt_format == "stage1" else None
