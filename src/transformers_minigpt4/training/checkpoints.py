"""Checkpoints of the trained modules: written completely or not at all, read with a check, one run per folder."""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4PreTrainedModel
from transformers_minigpt4.modeling.trained_modules_minigpt4 import base_checkpoint_record
from transformers_minigpt4.utils.file_names import RUN_FILE
from transformers_minigpt4.utils.files import (
    LOCK_FILE,
    PathLike,
    atomic_file,
    flush_folder,
    folder_lock,
    replace_folder,
)

from .resume_files import check_resume_files
from .stages import trainable_parameters


STAGING = ".saving"  # a checkpoint is here until it is complete


def save_trained(
    model: PreTrainedModel | PeftModel, folder: PathLike, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """
    Writes what was trained: PEFT's adapters, MiniGPT-4's trained modules with a record of their base, or, for other
    models and for sharded ones, only the tensors and the config.

    Args:
        model: The unwrapped model.
        folder (`str` or `os.PathLike`): Created if it does not exist.
        state_dict (`dict`, *optional*): Gathered tensors of a model that is sharded over ranks.
    """
    if isinstance(model, PeftModel):
        for adapter in model.peft_config.values():
            base = adapter.base_model_name_or_path
            if base and os.path.isdir(base):  # a relative path would look like a name on the Hub from other folders
                adapter.base_model_name_or_path = os.path.abspath(base)
        model.save_pretrained(str(folder), state_dict=state_dict)
        return
    if isinstance(model, MiniGPT4PreTrainedModel) and state_dict is None:
        model.save_pretrained(folder, trained_only=True)
        return
    state = model.state_dict() if state_dict is None else state_dict
    names, config = set(trainable_parameters(model)), copy.deepcopy(model.config)
    if isinstance(model, MiniGPT4PreTrainedModel):
        names |= set(config.trained_parameters or []) if config.base_checkpoints else set()
        config.base_checkpoints = config.base_checkpoints or [
            base_checkpoint_record(str(config.name_or_path), {"": ""})
        ]
        config.trained_parameters, config.architectures = sorted(names), [MiniGPT4ForConditionalGeneration.__name__]
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(names)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(folder) / SAFE_WEIGHTS_NAME) as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def load_trained(model: torch.nn.Module, folder: PathLike) -> None:
    """
    Loads the trained tensors of a checkpoint into a model, in place.

    Raises:
        ValueError: for a checkpoint of another model, another width or other trained modules.
    """
    path = Path(folder) / SAFE_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is not a checkpoint of this trainer: it has no {SAFE_WEIGHTS_NAME}.")
    state = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        missing = sorted(set(trainable_parameters(model)) - names)
        if missing or names - set(state):
            raise ValueError(
                f"The checkpoint {folder} does not fit the stage: it lacks {missing[:3] or 'nothing'} and has "
                f"{sorted(names - set(state))[:3] or 'nothing'} that the model lacks. Resume with the recipe that "
                "wrote it."
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


@contextlib.contextmanager
def run_lock(folder: PathLike) -> Iterator[None]:
    """
    Keeps other runs out of an output folder while this one runs; the system frees the lock when the process ends.

    A folder that this created, and in which nothing was written because the run could not begin, is removed.

    Raises:
        RuntimeError: on entry, if another run holds it.
    """
    refusal = f"Another run ({{owner}}) writes into {folder}. Wait for it, or choose another --output."
    existed = os.path.isdir(folder)
    with folder_lock(folder, refusal):
        try:
            yield
        finally:
            if not existed and os.listdir(folder) == [LOCK_FILE]:
                with contextlib.suppress(OSError):  # Windows removes no open file
                    os.unlink(Path(folder) / LOCK_FILE)
                    os.rmdir(folder)


def resolve_resume(folder: PathLike, resume: str | bool | None) -> str | None:
    """
    The checkpoint to resume from.

    Args:
        folder (`str` or `os.PathLike`): The run's output folder.
        resume (`str`, `bool` or `None`): A checkpoint, true for the folder's last one, if it has any, or false.

    Raises:
        ValueError: for a checkpoint that does not exist or is damaged, and a folder with checkpoints that would be
            overwritten.
    """
    resume = _resume_value(resume)
    last = get_last_checkpoint(str(folder)) if os.path.isdir(folder) else None
    if resume is True:
        if last is not None:
            check_resume_files(last)
        return last
    if isinstance(resume, str):
        if not os.path.isdir(resume):
            raise ValueError(
                f"--resume-from-checkpoint {resume} is not a folder. Name a checkpoint, or set it to true for the "
                f"last one in {folder}."
            )
        check_resume_files(resume)
        return resume
    if last is not None:
        raise ValueError(
            f"{folder} contains {os.path.basename(last)} of an earlier run. Resume with --resume-from-checkpoint "
            "true, or choose another --output."
        )
    return None


def record_finished(folder: PathLike, state: TrainerState) -> None:
    """Records in an output folder that its run is finished, with transformers' `trainer_state.json`; written last."""
    with atomic_file(Path(folder) / TRAINER_STATE_NAME) as scratch:
        state.save_to_json(str(scratch))


def is_finished(config: TrainingArguments, settings: Mapping[str, object]) -> bool:
    """
    Whether the run that is asked for has been finished in its output folder.

    Args:
        config (`TrainingArguments`): Says where, how many steps, and whether to resume.
        settings (`Mapping[str, object]`): The recipe, see [`recipe_settings`]. A run that is not to be resumed is the
            same only if none of them differs from those recorded.
    """
    output = Path(str(config.output_dir))
    resume = _resume_value(config.resume_from_checkpoint)
    if _steps_done(output) < config.max_steps:
        return False
    if isinstance(resume, str):
        return Path(resume).resolve().parent == output.resolve() and _steps_done(Path(resume)) >= config.max_steps
    return resume is True or _recorded(output) == _comparable(settings)


def _resume_value(resume: str | bool | None) -> str | bool | None:
    """`resume_from_checkpoint`, of which a command line makes text."""
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        return resume.lower() == "true"
    return resume


def _steps_done(folder: Path) -> int:
    """Steps of a checkpoint, or of a finished run; -1 if the folder is neither."""
    try:
        return int(json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def _recorded(folder: Path) -> dict[str, object] | None:
    try:
        return _comparable(json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _comparable(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings as JSON, without those that do not change a result."""
    kept = {key: value for key, value in settings.items() if key not in ("resume_from_checkpoint", "disable_tqdm")}
    return json.loads(json.dumps(kept, default=str))


def publish(staged: Path, final: Path) -> None:
    """Moves a complete checkpoint to its name, once it is on the disk; a checkpoint of that name is replaced."""
    flush_folder(staged)
    replace_folder(staged, final)
    shutil.rmtree(staged.parent, ignore_errors=True)
