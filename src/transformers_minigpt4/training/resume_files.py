"""Checks the files that a run resumes from, before a model is loaded: complete, and nothing but numbers in them."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME_BIN, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from transformers_minigpt4.utils.files import PathLike
from transformers_minigpt4.utils.json_files import read_json


def check_resume_files(checkpoint: PathLike) -> None:
    """
    Reads what a run would read to resume, tensors excepted.

    Libraries would stop at a bad file too, but only after the model is loaded, without the file's name, and with the
    advice to load it as code.

    Raises:
        ValueError: for a file that is damaged, or contains anything but tensors, numbers and texts.
    """
    folder = Path(checkpoint)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".pt", ".pth") or path.name == OPTIMIZER_NAME_BIN:
            read_saved(path, mmap=True)
        elif path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(_refusal(path, f"it is damaged or cut short ({error})")) from error
    state = folder / TRAINER_STATE_NAME
    try:
        found = read_json(state)
    except (OSError, ValueError) as error:
        raise ValueError(_refusal(state, f"it is missing or damaged ({error})")) from error
    if not isinstance(found, dict) or not isinstance(found.get("global_step"), int):
        raise ValueError(_refusal(state, "it does not contain the state of a trainer"))


def read_saved(path: Path, mmap: bool = False) -> Any:
    """
    The content of a file of `torch.save`; code in it is not run.

    Args:
        path (`Path`): The file.
        mmap (`bool`, *optional*, defaults to `False`): Leaves tensors in the file until they are used.

    Raises:
        ValueError: for a file that is damaged, or contains anything but tensors, numbers and texts.
    """
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise ValueError(_refusal(path, "it is damaged or cut short, or another program wrote it"))
    try:
        with safe_globals():  # for NumPy's random state
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # of many kinds; torch's words advise to allow the code
        found = _unknown(path)
        why = f"it names {', '.join(found)}, which could run code" if found else "it is damaged"
        raise ValueError(_refusal(path, why)) from error


def _unknown(path: Path) -> list[str]:
    """Functions and classes that a file names and that numbers do not need."""
    try:
        with safe_globals():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:3]
    except Exception:  # a file too damaged to be looked through
        return []


def _refusal(path: Path, why: str) -> str:
    return (
        f"{os.fspath(path)} cannot be resumed from: {why}. Nothing in it was run. Name an earlier checkpoint with "
        "--resume-from-checkpoint FOLDER, or start a new run in another --output."
    )
