"""Where `minigpt4 demo` keeps a copy of its model, and where commands find it, whatever folder they are run in."""

import json
import shutil
from pathlib import Path

from huggingface_hub import constants

from transformers_minigpt4.utils.file_names import RUN_FILE
from transformers_minigpt4.utils.files import atomic_folder


TOY_WORLD = "python:transformers_minigpt4.demo."  # how recipes name the rows of the demo


def kept_checkpoint() -> Path:
    """The folder of the copy, in the cache of Hugging Face; it need not exist."""
    return Path(constants.HF_HOME) / "minigpt4-demo" / "checkpoint"


def keep_checkpoint(checkpoint: Path) -> None:
    """Copies a checkpoint there in place of an earlier one, completely or not at all."""
    with atomic_folder(kept_checkpoint()) as scratch:
        shutil.copytree(checkpoint, scratch, dirs_exist_ok=True)


def demo_checkpoint() -> str:
    """
    The kept checkpoint.

    Raises:
        ValueError: before the first `minigpt4 demo`.
    """
    checkpoint = kept_checkpoint()
    if not (checkpoint / "config.json").is_file():
        raise ValueError(
            f"there is no model in {str(checkpoint)!r}; run `minigpt4 demo` to create one, or name a checkpoint"
        )
    return str(checkpoint)


def knows_drawn_shapes_only(checkpoint: str) -> bool:
    """Whether a checkpoint was trained on the demo's toy world, as far as the folder says."""
    folder = Path(checkpoint)
    if folder == kept_checkpoint():
        return True
    try:
        sources = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["recipe"]["sources"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return isinstance(sources, list) and any(str(source).startswith(TOY_WORLD) for source in sources)
