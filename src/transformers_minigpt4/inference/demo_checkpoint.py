"""Where `minigpt4 demo` keeps a copy of its model, and where commands find it, whatever folder they are run in."""

import shutil
from pathlib import Path

from huggingface_hub import constants

from transformers_minigpt4.utils.files import atomic_folder


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
            f"there is no model in {str(checkpoint)!r}; run `minigpt4 demo` to create one, or name one with --model"
        )
    return str(checkpoint)
