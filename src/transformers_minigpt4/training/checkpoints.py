"""Checkpoints of the trained parts: written whole or not at all, read with a check, one run to a folder."""

import copy
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4PreTrainedModel
from transformers_minigpt4.modeling.trained_modules_minigpt4 import base_checkpoint_record

from .stages import trainable_parameters


STAGING = ".saving"  # a checkpoint stands here until it is whole
_LOCK = ".lock"
_held: set[Path] = set()  # by this process, against which a POSIX lock does not guard


def save_trained(model: Any, folder: str | os.PathLike, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """
    Writes what trains: PEFT's adapters, MiniGPT-4's trained parts with a record of their base, or, for other models
    and for sharded ones, the tensors alone beside the config.

    Args:
        model: The unwrapped model.
        folder (`str` or `os.PathLike`): Made where it lacks.
        state_dict (`dict`, *optional*): Gathered tensors of a model that is sharded over ranks.
    """
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model.save_pretrained(folder, state_dict=state_dict)
        return
    if isinstance(model, MiniGPT4PreTrainedModel) and state_dict is None:
        model.save_pretrained(folder, trained_only=True)
        return
    state = model.state_dict() if state_dict is None else state_dict
    names, config = set(trainable_parameters(model)), copy.deepcopy(model.config)
    if isinstance(model, MiniGPT4PreTrainedModel):
        names |= set(config.trained_parameters or []) if config.base_checkpoints else set()
        config.base_checkpoints = config.base_checkpoints or [base_checkpoint_record(config.name_or_path, {"": ""})]
        config.trained_parameters, config.architectures = sorted(names), [MiniGPT4ForConditionalGeneration.__name__]
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(names)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    scratch = Path(folder) / f".{SAFE_WEIGHTS_NAME}.part"
    try:
        save_file(tensors, scratch, metadata={"format": "pt"})
        os.replace(scratch, Path(folder) / SAFE_WEIGHTS_NAME)
    finally:
        scratch.unlink(missing_ok=True)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def load_trained(model: torch.nn.Module, folder: str | os.PathLike) -> None:
    """
    Puts the trained tensors of a checkpoint into a model, in place.

    Raises:
        ValueError: for a checkpoint of another model, another width or other trained parts.
    """
    path = Path(folder) / SAFE_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint of this trainer: it has no {SAFE_WEIGHTS_NAME}.")
    state = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        missing = sorted(set(trainable_parameters(model)) - names)
        if missing or names - set(state):
            raise ValueError(
                f"The checkpoint {folder} does not fit the stage: it lacks {missing[:3] or 'nothing'} and has "
                f"{sorted(names - set(state))[:3] or 'nothing'} that the model lacks. Resume with the recipe it came "
                "from."
            )
        for name in sorted(names):
            found, wanted = file.get_slice(name).get_shape(), list(state[name].shape)
            if found != wanted:
                raise ValueError(
                    f"The checkpoint {folder} is of another width: {name} is {found}, and the model has {wanted}. "
                    "Resume on the base that it was trained on."
                )
        with torch.no_grad():
            for name in sorted(names):
                state[name].copy_(file.get_tensor(name))


@contextmanager
def run_lock(folder: str | os.PathLike) -> Iterator[None]:
    """
    Keeps other runs out of an output folder while this one lasts; the system frees it when the process ends.

    Raises:
        RuntimeError: when another run has it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = (Path(folder) / _LOCK).resolve()
    if path in _held:
        raise RuntimeError(
            f"Another run (process {os.getpid()}) writes into {folder}. Wait for it, or choose another output_dir."
        )
    with open(path, "a+") as file:
        try:
            # A POSIX lock, which data workers do not inherit: they outlive a killed run by seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise RuntimeError(
                f"Another run (process {owner}) writes into {folder}. Wait for it, or choose another output_dir."
            ) from error
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)


def resolve_resume(folder: str | os.PathLike, resume: str | bool | None) -> str | None:
    """
    The checkpoint to go on from.

    Args:
        folder (`str` or `os.PathLike`): The run's output folder.
        resume (`str`, `bool` or `None`): A checkpoint, true for the folder's last one (none yet: start), or false.

    Raises:
        ValueError: for a folder with checkpoints that the run would write over.
    """
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    last = get_last_checkpoint(str(folder)) if os.path.isdir(folder) else None
    if resume is True:
        return last
    if isinstance(resume, str):
        return resume
    if last is not None:
        raise ValueError(
            f"{folder} holds {os.path.basename(last)} of an earlier run. Go on with --resume_from_checkpoint true, or "
            "choose another output_dir."
        )
    return None


def publish(staged: Path, final: Path) -> None:
    """Moves a whole checkpoint to its name, after its bytes are on the disk; what had the name goes out of the way."""
    for path in [*staged.rglob("*"), staged]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if final.exists():  # an earlier attempt at the same step, before a resume from an older checkpoint
        os.replace(final, staged.with_name(f"{final.name}.old"))  # deleting takes time, and a kill would leave a part
    os.replace(staged, final)
    shutil.rmtree(staged.parent, ignore_errors=True)
