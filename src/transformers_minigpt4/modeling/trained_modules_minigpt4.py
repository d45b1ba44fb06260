"""Checkpoints the size of what was trained: the trained tensors, and a record of the base checkpoints they stand on.

The record is `config.base_checkpoints`, a list of dicts:

- `name_or_path` and `revision`: where the base is, on the Hub or in a folder;
- `prefixes`: what the base's tensors are called here, prefix by prefix; others of its tensors are left alone;
- `fingerprint`: of the tensors taken, see [`fingerprint`].

A tensor of the checkpoint itself stands before one of a base. One named `KEY@rows` is appended to the base's `KEY`,
which is how the image token's row joins a language model that lacks it.
"""

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files, resolve_revision


ROWS = "@rows"
_SAMPLE_BYTES = 4096


def checkpoint_files(name_or_path: str, **hub_kwargs) -> list[Path]:
    """
    The safetensors files of a checkpoint, downloaded where need be.

    Args:
        name_or_path (`str`): A folder or a Hub id.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.

    Raises:
        OSError: when the checkpoint cannot be found or has no safetensors weights.
    """
    try:
        options = {**hub_kwargs, "_raise_exceptions_for_missing_entries": False}
        single = cached_file(name_or_path, SAFE_WEIGHTS_NAME, **options)
        if single is not None:
            return [Path(single)]
        index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **options)
    except (OSError, HFValidationError) as error:
        raise OSError(f"The checkpoint {name_or_path} cannot be read: {str(error).splitlines()[0]}") from error
    if index is None:
        raise OSError(
            f"{name_or_path} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. Check the path; a "
            "checkpoint in another format has to be converted first."
        )
    files, _ = get_checkpoint_shard_files(name_or_path, index, **hub_kwargs)
    missing = [file for file in files if not os.path.exists(file)]
    if missing:
        raise OSError(
            f"{name_or_path} lacks {len(missing)} of its shards: {', '.join(map(os.path.basename, missing))}."
        )
    return [Path(file) for file in files]


def fingerprint(files: list[Path], names: set[str] | None = None) -> str:
    """
    SHA-256 over name, dtype, shape and samples of the bytes of tensors, however they are spread over files.

    4 KiB at the start, in the middle and at the end of each tensor: training or quantising changes these, and reading
    15 GB at each start would take longer than loading. It tells other weights apart; it is no proof against forgery.

    Args:
        files (`list[Path]`): safetensors files.
        names (`set[str]`, *optional*): Tensors that count; all by default.
    """
    entries = []
    for path in files:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            for name, entry in header.items():
                if name == "__metadata__" or (names is not None and name not in names):
                    continue
                begin, end = entry["data_offsets"]
                digest = hashlib.sha256(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
                for offset in sorted({begin, (begin + end) // 2, max(begin, end - _SAMPLE_BYTES)}):
                    file.seek(8 + size + offset)
                    digest.update(file.read(min(_SAMPLE_BYTES, end - offset)))
                entries.append((name, digest.hexdigest()))
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()


class LazyTensors(dict):
    """Slices of safetensors files by tensor name; a tensor is read when its slice is indexed."""

    def __init__(self, files: list[Path]):
        super().__init__()
        self.files = files
        self.handles = []  # the slices live as long as their files are open
        for path in files:
            try:
                handle = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise OSError(f"{path} is no whole safetensors file ({error}). Download or save it again.") from error
            self.handles.append(handle)
            for name in handle.keys():  # noqa: SIM118  a safetensors handle is no mapping
                self[name] = handle.get_slice(name)


def target_name(name: str, prefixes: dict[str, str]) -> str | None:
    """What a base's tensor is called here; `None` for one that is not taken."""
    for source, target in prefixes.items():
        if name.startswith(source):
            return target + name[len(source) :]
    return None


def commit_of(name_or_path: str, revision: str | None = None) -> str | None:
    """The commit that a revision of a Hub repository stands for, or the revision where nobody can tell."""
    for local in (False, True):
        resolved = resolve_revision(name_or_path, revision, local_files_only=local)
        if (commit := getattr(resolved, "resolved", None)) is not None:
            return str(commit)
    return revision


def base_checkpoint_record(name_or_path: str, prefixes: dict[str, str], **hub_kwargs) -> dict[str, Any]:
    """
    Record of a base checkpoint, for `config.base_checkpoints`.

    Args:
        name_or_path (`str`): A folder or a Hub id.
        prefixes (`dict[str, str]`): Prefixes of its tensor names, and what takes their places here.
    """
    is_local = os.path.isdir(name_or_path)
    revision = None if is_local else commit_of(name_or_path, hub_kwargs.get("revision"))
    files = checkpoint_files(name_or_path, **{**hub_kwargs, "revision": revision})
    return {
        "name_or_path": os.path.abspath(name_or_path) if is_local else name_or_path,
        "revision": revision,
        "prefixes": prefixes,
        "fingerprint": fingerprint(files, _names_taken(files, prefixes)),
    }


def _names_taken(files: list[Path], prefixes: dict[str, str]) -> set[str]:
    return {name for name in LazyTensors(files) if target_name(name, prefixes) is not None}


def assemble(base_checkpoints: list[dict[str, Any]], own_files: list[Path], **hub_kwargs) -> dict[str, Any]:
    """
    The whole state dict of a checkpoint that holds trained parts alone.

    Args:
        base_checkpoints (`list[dict]`): The record of its config.
        own_files (`list[Path]`): Its own safetensors files.
        hub_kwargs: `token`, `cache_dir`, `local_files_only` for bases on the Hub.

    Returns:
        `dict`: Tensors or lazy slices by name.

    Raises:
        OSError: for a base that cannot be found.
        ValueError: for a base whose weights are others than those that were trained on.
    """
    own = LazyTensors(own_files)
    added_rows = {name.removesuffix(ROWS): tensor for name, tensor in own.items() if name.endswith(ROWS)}
    whole_own = {name: tensor for name, tensor in own.items() if not name.endswith(ROWS)}
    state: dict[str, Any] = {}
    for base in base_checkpoints:
        name_or_path = base["name_or_path"]
        try:
            files = checkpoint_files(name_or_path, **{**hub_kwargs, "revision": base["revision"]})
        except OSError as error:
            raise OSError(
                f"This checkpoint holds trained parts alone and stands on {name_or_path}, which cannot be read: "
                f"{error} Where the base lies elsewhere now, name that place as `base_checkpoints` in config.json."
            ) from error
        taken = _names_taken(files, base["prefixes"])
        found = fingerprint(files, taken)
        if found != base["fingerprint"]:
            raise ValueError(
                f"The weights of {name_or_path} are not those that this checkpoint was trained on (fingerprint "
                f"{found[:12]}, recorded {base['fingerprint'][:12]}). Take the original base, or train again."
            )
        tensors = LazyTensors(files)
        for name in taken:
            state[target_name(name, base["prefixes"])] = tensors[name]  # type: ignore[index]
    for name, rows in added_rows.items():
        state[name] = torch.cat([state[name][:], rows[:].to(state[name][:0].dtype)])
    return {**state, **whole_own}


def save_trained_modules(model, save_directory: str | os.PathLike) -> None:
    """
    Writes `config.json` with the record of the bases, `generation_config.json` and the trained tensors.

    Trained are the parameters that require gradients now, and those that the checkpoint the model came from brought.

    Args:
        model: A model that came from `from_pretrained`.
        save_directory (`str` or `os.PathLike`): Made where it lacks.

    Raises:
        ValueError: for a model without base or trained parameters, for a PEFT adapter, for the base's own folder, and
            for changes in parameters that do not count as trained and would be lost, as far as samples show them.
    """
    state = model.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    bases = model.config.base_checkpoints
    own = trained | set(model.config.trained_parameters or []) if bases else trained
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} has no head. Save the trained parts of the model that generates.")
    if adapters := [name for name in own if "lora_" in name or "modules_to_save" in name]:
        raise ValueError(
            f"{adapters[0]} belongs to a PEFT adapter, which is saved by PEFT: "
            "`get_peft_model(model, config).save_pretrained(folder)`."
        )
    if not own:
        raise ValueError(
            "No parameter requires gradients, so there are no trained parts. Save the whole model instead."
        )
    if not bases:
        path = model.config.name_or_path
        if not path:
            raise ValueError(
                "This model was not loaded from a checkpoint, so its trained parts have no base to stand on. "
                "Save it whole once with `save_pretrained(folder)`, load that, and train it."
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
        raise OSError(f"The trained parts could not be written to {folder}: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)
    for stale in (folder / SAFE_WEIGHTS_INDEX_NAME, *folder.glob("model-*-of-*.safetensors")):
        stale.unlink(missing_ok=True)  # of a whole model that was saved here before


def _check_unchanged(state: dict[str, torch.Tensor], bases: list[dict[str, Any]], own: set[str]) -> None:
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
                continue  # quantised in memory, or kept on disk
            rows = sorted({round(i * (shape[0] - 1) / 7) for i in range(8)}) if shape else []
            grown = now.shape[0] != shape[0] and f"{target}{ROWS}" not in own if shape else False
            if grown or not all(torch.equal(now[i].cpu(), saved[i : i + 1][0].to(now.dtype)) for i in rows):
                changed.append(target)
    if changed:
        raise ValueError(
            f"{len(changed)} parameters differ from the base although they do not require gradients now "
            f"({', '.join(changed[:3])}, …). Saving the trained parts alone would lose them: save the whole model."
        )
