"""
Checkpoints the size of what was trained: the trained tensors, and a record of the base checkpoints with the rest.

The record is `config.base_checkpoints`, a list of dicts:

- `name_or_path` and `revision`: where the base is, on the Hub or in a folder;
- `prefixes`: what the base's tensors are called here, prefix by prefix; its other tensors are ignored;
- `fingerprint`: of the tensors taken, see [`fingerprint`].

A tensor of the checkpoint itself takes precedence over one of a base. One named `KEY@rows` is appended to the base's
`KEY`, which is how a language model gets its row for the image token.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias, TypedDict, Unpack

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import HFValidationError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash, get_checkpoint_shard_files

from .configuration_minigpt4 import BaseCheckpoint


PathLike: TypeAlias = str | os.PathLike[str]
ROWS = "@rows"
_SAMPLE_BYTES = 4096


class HubOptions(TypedDict, total=False):
    """Where on the Hub a checkpoint is, and how it is downloaded: options of `from_pretrained`."""

    revision: str | None
    token: str | bool | None
    cache_dir: PathLike | None
    local_files_only: bool
    subfolder: str


class TensorSlice(Protocol):
    """A tensor in a safetensors file; indexing it reads what is asked for."""

    def __getitem__(self, index: slice) -> torch.Tensor: ...

    def get_shape(self) -> list[int]: ...


class NoSafetensorsError(OSError):
    """A folder or repository without weights in safetensors format."""


def find_file(name_or_path: str, file: str, **hub_options: Unpack[HubOptions]) -> Path | None:
    """
    A file of a folder or a Hub repository, downloaded if necessary; `None` if there is no such file in it.

    Raises:
        OSError: when the folder or repository cannot be read.
        HFValidationError: for a name that is neither a folder nor a valid Hub id.
    """
    path = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub_options)
    return None if path is None else Path(path)


def checkpoint_files(name_or_path: str, **hub_options: Unpack[HubOptions]) -> list[Path]:
    """
    The safetensors files of a checkpoint, downloaded if necessary.

    Args:
        name_or_path (`str`): A folder or a Hub id.
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

    Raises:
        OSError: when the checkpoint cannot be found, or a shard is missing; [`NoSafetensorsError`] when it has no
            safetensors weights.
    """
    try:
        if (single := find_file(name_or_path, SAFE_WEIGHTS_NAME, **hub_options)) is not None:
            return [single]
        index = find_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **hub_options)
    except (OSError, HFValidationError) as error:
        raise OSError(f"The checkpoint {name_or_path} cannot be read: {str(error).splitlines()[0]}") from error
    if index is None:
        raise NoSafetensorsError(
            f"{name_or_path} contains neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. Check the path; a "
            "checkpoint in another format has to be converted first."
        )
    try:
        files, _ = get_checkpoint_shard_files(name_or_path, str(index), **hub_options)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise OSError(
            f"{index} does not list the shards of a checkpoint, and is damaged. Download or save it again."
        ) from error
    missing = [os.path.basename(file) for file in files if not os.path.exists(file)]
    if missing:
        raise OSError(f"{name_or_path} lacks {len(missing)} of its shards: {', '.join(missing)}.")
    return [Path(file) for file in files]


def fingerprint(files: Iterable[Path], names: Collection[str] | None = None) -> str:
    """
    SHA-256 over name, dtype, shape and samples of the bytes of tensors, however they are distributed over files.

    4 KiB at the start, in the middle and at the end of each tensor: training or quantizing changes these, and reading
    15 GB at each start would take longer than loading. It distinguishes weights; it does not protect against forgery.

    Args:
        files (`Iterable[Path]`): safetensors files.
        names (`Collection[str]`, *optional*): Tensors that count; all by default.

    Returns:
        `str`: 64 hexadecimal digits.

    Raises:
        OSError: for a file that is incomplete or not a safetensors file.
    """
    entries = []
    for path in files:
        try:
            tensors = parse_local_safetensors_file_metadata(path).tensors
        except SafetensorsParsingError as error:
            raise OSError(_incomplete(path, error)) from error
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")  # of the data, after the header and its length
            for name, info in tensors.items():
                if names is not None and name not in names:
                    continue
                begin, end = info.data_offsets
                digest = hashlib.sha256(json.dumps([name, info.dtype, info.shape]).encode())
                for offset in sorted({begin, (begin + end) // 2, max(begin, end - _SAMPLE_BYTES)}):
                    file.seek(start + offset)
                    digest.update(file.read(min(_SAMPLE_BYTES, end - offset)))
                entries.append((name, digest.hexdigest()))
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()


def _incomplete(path: Path, error: Exception) -> str:
    return f"{path} is not a complete safetensors file ({error}). Download or save it again."


class LazyTensors(dict[str, TensorSlice]):
    """
    Slices of safetensors files by tensor name; a tensor is read when its slice is indexed.

    Raises:
        OSError: for a file that is incomplete or not a safetensors file.
    """

    def __init__(self, files: Iterable[Path]):
        super().__init__()
        self.handles = []  # the slices live as long as their files are open
        for path in files:
            try:
                handle = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise OSError(_incomplete(path, error)) from error
            self.handles.append(handle)
            for name in handle.keys():  # noqa: SIM118  a safetensors handle is not a mapping
                self[name] = handle.get_slice(name)


def adapter_base(folder: PathLike) -> str:
    """
    Folder or Hub id of the base of a PEFT adapter.

    Raises:
        ValueError: for an `adapter_config.json` that names none.
    """
    path = os.path.join(folder, "adapter_config.json")
    try:
        with open(path, encoding="utf-8") as file:
            base = json.load(file)["base_model_name_or_path"]
    except (LookupError, RecursionError, TypeError, ValueError):
        base = None
    if not isinstance(base, str):
        raise ValueError(f"{path} names no base_model_name_or_path. Save the adapter again, or write it there.")
    return base


def target_name(name: str, prefixes: Mapping[str, str]) -> str | None:
    """What a base's tensor is called here; `None` for one that is not taken."""
    for source, target in prefixes.items():
        if name.startswith(source):
            return target + name[len(source) :]
    return None


def commit_of(name_or_path: str, **hub_options: Unpack[HubOptions]) -> str | None:
    """
    The commit of a Hub repository that its config comes from, or the revision itself if that cannot be found out.

    Args:
        name_or_path (`str`): A Hub id.
        hub_options: See [`checkpoint_files`].
    """
    try:
        config = find_file(name_or_path, CONFIG_NAME, **hub_options)
    except (HFValidationError, OSError):
        config = None
    commit = None if config is None else extract_commit_hash(str(config), None)
    return commit or hub_options.get("revision")


def base_checkpoint_record(
    name_or_path: str, prefixes: dict[str, str], **hub_options: Unpack[HubOptions]
) -> BaseCheckpoint:
    """
    Record of a base checkpoint, for `config.base_checkpoints`.

    Args:
        name_or_path (`str`): A folder or a Hub id.
        prefixes (`dict[str, str]`): Prefixes of its tensor names, and what replaces them here.
        hub_options: See [`checkpoint_files`].
    """
    is_local = os.path.isdir(name_or_path)
    revision = None if is_local else commit_of(name_or_path, **hub_options)
    hub_options["revision"] = revision
    files = checkpoint_files(name_or_path, **hub_options)
    return {
        "name_or_path": os.path.abspath(name_or_path) if is_local else name_or_path,
        "revision": revision,
        "prefixes": prefixes,
        "fingerprint": fingerprint(files, _names_taken(files, prefixes)),
    }


def _names_taken(files: list[Path], prefixes: Mapping[str, str]) -> dict[str, str]:
    """Names here by names in the base's files, of the tensors that are taken."""
    targets = {name: target_name(name, prefixes) for name in LazyTensors(files)}
    return {name: target for name, target in targets.items() if target is not None}


def assemble(
    base_checkpoints: list[BaseCheckpoint], own_files: list[Path], **hub_options: Unpack[HubOptions]
) -> dict[str, torch.Tensor | TensorSlice]:
    """
    The complete state dict of a checkpoint that holds only trained modules.

    Args:
        base_checkpoints (`list[dict]`): The record of its config.
        own_files (`list[Path]`): Its own safetensors files.
        hub_options: `token`, `cache_dir`, `local_files_only` for bases on the Hub.

    Returns:
        `dict`: Tensors or lazy slices by name.

    Raises:
        OSError: for a base that cannot be found.
        ValueError: for a base with weights other than those used in training.
    """
    own = LazyTensors(own_files)
    state: dict[str, torch.Tensor | TensorSlice] = {}
    for base in base_checkpoints:
        name_or_path = base["name_or_path"]
        hub_options["revision"] = base["revision"]
        try:
            files = checkpoint_files(name_or_path, **hub_options)
        except OSError as error:
            raise OSError(
                f"This checkpoint holds only trained modules; the rest is in {name_or_path}, which cannot be read: "
                f"{error} If the base has moved, change its path in `base_checkpoints` in config.json."
            ) from error
        taken = _names_taken(files, base["prefixes"])
        found = fingerprint(files, taken)
        if found != base["fingerprint"]:
            raise ValueError(
                f"The weights of {name_or_path} are not those that this checkpoint was trained on (fingerprint "
                f"{found[:12]}, recorded {base['fingerprint'][:12]}). Take the original base, or train again."
            )
        tensors = LazyTensors(files)
        state.update({target: tensors[name] for name, target in taken.items()})
    for name, tensor in own.items():
        if name.endswith(ROWS):
            shorter = state[name.removesuffix(ROWS)][:]
            state[name.removesuffix(ROWS)] = torch.cat([shorter, tensor[:].to(shorter.dtype)])
    return {**state, **{name: tensor for name, tensor in own.items() if not name.endswith(ROWS)}}


def save_trained_modules(model: PreTrainedModel, save_directory: PathLike) -> None:
    """
    Writes `config.json` with the record of the bases, `generation_config.json` and the trained tensors.

    Trained are the parameters that require gradients now, and those that the model's own checkpoint held.

    Args:
        model (`PreTrainedModel`): A model that came from `from_pretrained`.
        save_directory (`str` or `os.PathLike`): Created if it does not exist.

    Raises:
        ValueError: for a model without base or trained parameters, for a PEFT adapter, for the base's own folder, and
            for changes in parameters that do not count as trained and would be lost, as far as samples show them.
    """
    state = model.state_dict()
    own = _trained_names(model)
    bases = model.config.base_checkpoints
    if not bases:
        path = model.config.name_or_path
        if not path:
            raise ValueError(
                "This model was not loaded from a checkpoint, so its trained modules have no base to refer to. "
                "Save the complete model once with `save_pretrained(folder)`, load that, and train it."
            )
        bases = [base_checkpoint_record(path, {"": ""}, revision=getattr(model, "_base_revision", None))]
    folder = Path(save_directory)
    if any(os.path.realpath(folder) == os.path.realpath(base["name_or_path"]) for base in bases):
        raise ValueError(
            f"{folder} is the base itself, whose frozen weights would be overwritten. Name another folder."
        )
    _check_unchanged(state, bases, own)

    config = copy.deepcopy(model.config)
    config.base_checkpoints, config.trained_parameters = bases, sorted(own)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).split(".")[1]
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # how the base was loaded this time
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(own)}
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{SAFE_WEIGHTS_NAME}.{os.getpid()}.part"
    try:
        save_file(tensors, scratch, metadata={"format": "pt"})
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        os.replace(scratch, folder / SAFE_WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise OSError(f"The trained modules could not be written to {folder}: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)
    for stale in (folder / SAFE_WEIGHTS_INDEX_NAME, *folder.glob("model-*-of-*.safetensors")):
        stale.unlink(missing_ok=True)  # of a complete model that was saved here before


def _trained_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that a checkpoint of trained modules must hold itself."""
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} has no head. Save the trained modules of the model that generates.")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if model.config.base_checkpoints:
        names |= set(model.config.trained_parameters or [])
    if adapters := [name for name in names if "lora_" in name or "modules_to_save" in name]:
        raise ValueError(
            f"{adapters[0]} belongs to a PEFT adapter, which is saved by PEFT: "
            "`get_peft_model(model, config).save_pretrained(folder)`."
        )
    if not names:
        raise ValueError(
            "No parameter requires gradients, so there are no trained modules. Save the complete model instead."
        )
    return names


def _check_unchanged(state: Mapping[str, torch.Tensor], bases: list[BaseCheckpoint], own: set[str]) -> None:
    """Compares shape and eight rows of every untrained parameter with its base."""
    changed = []
    for base in bases:
        files = checkpoint_files(base["name_or_path"], revision=base["revision"])
        for name, saved in LazyTensors(files).items():
            target = target_name(name, base["prefixes"])
            if target is None or target in own or target not in state:
                continue
            now, shape = state[target], saved.get_shape()
            if not now.is_floating_point() or now.is_meta or list(now.shape[1:]) != shape[1:]:
                continue  # quantized in memory, or kept on disk
            rows = sorted({round(i * (shape[0] - 1) / 7) for i in range(8)}) if shape else []
            grown = now.shape[0] != shape[0] and f"{target}{ROWS}" not in own if shape else False
            if grown or not all(torch.equal(now[i].cpu(), saved[i : i + 1][0].to(now.dtype)) for i in rows):
                changed.append(target)
    if changed:
        raise ValueError(
            f"{len(changed)} parameters differ from the base although they do not require gradients now "
            f"({', '.join(changed[:3])}, …). Saving only the trained modules would lose them: save the complete model."
        )
