"""Which files of a checkpoint or a PEFT adapter are published, checked before anything is sent."""

import ast
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from transformers_minigpt4.conversion.merge import ADAPTER_CONFIG
from transformers_minigpt4.modeling.checkpoint_checks_minigpt4 import check_fits
from transformers_minigpt4.modeling.configuration_minigpt4 import MiniGPT4Config, with_current_keys
from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from transformers_minigpt4.modeling.trained_modules_minigpt4 import LazyTensors, checkpoint_files
from transformers_minigpt4.utils.checkpoint_files import check_checkpoint_files
from transformers_minigpt4.utils.file_names import RUN_FILE
from transformers_minigpt4.utils.files import JsonObject

from .cards import License, adapter_card, derive_license, model_card
from .records import read_facts, read_run, read_sources
from .upload import CARD_FILE, MAIN, WEIGHTS, Publication


ADAPTER_WEIGHTS = f"adapter_model{WEIGHTS}"

_PACKAGE = Path(__file__).parents[1]
_INDEX = "model.safetensors.index.json"
_TEMPLATE_FOLDER = "additional_chat_templates"  # the one subfolder that transformers saves
_PLAIN_NAMES = re.compile(r"tokenizer\.model|(merges|vocab)\.txt|(LICEN[CS]E|NOTICE|USE_POLICY)(\..*)?", re.IGNORECASE)
_TRAINER_FILES = {"trainer_state.json"}
_SECRET_NAMES = re.compile(r"(.*[._-])?(secrets?|credentials?|token|auth|api_?keys?|service_?account.*)\.json", re.I)
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def check_repo_id(repo_id: str) -> None:
    """
    Raises:
        ValueError: for what cannot be `namespace/name` on the Hub.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a valid name on the Hub: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no owner; write it as namespace/{repo_id}")


def is_adapter(folder: Path) -> bool:
    """Whether a folder contains a PEFT adapter, and not a complete model with one."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def has_local_base(folder: Path) -> bool:
    """Whether a checkpoint of trained modules, or an adapter, needs a base that only this computer has."""
    if is_adapter(folder):
        return not _can_be_on_hub(str(read_facts(folder, ADAPTER_CONFIG).get("base_model_name_or_path") or ""))
    return bool(_local_bases(read_facts(folder, "config.json")))


def prepare_adapter(
    folder: Path, repo_id: str, license: License | None, language: Sequence[str], base: str | None
) -> Publication:
    """
    Collects and checks the files of a PEFT adapter, and writes its card.

    Args:
        folder, repo_id, license, language, base: As for [`~publish.push_to_hub`].

    Raises:
        ValueError: for an adapter without safetensors weights, or whose base is not on the Hub.
    """
    check_checkpoint_files(folder)
    config = read_facts(folder, ADAPTER_CONFIG)
    local = str(config.get("base_model_name_or_path") or "")
    foreign = read_facts(Path(local), "config.json").get("model_type", "minigpt4") if local else "minigpt4"
    if foreign != "minigpt4":
        raise ValueError(f"{folder} is an adapter of a {foreign!r} model, and only those of MiniGPT-4 are published")
    publication = Publication(repo_id, "model", {})
    _collect(folder, publication)
    if ADAPTER_WEIGHTS not in publication.files:
        raise ValueError(f"{folder} contains no {ADAPTER_WEIGHTS}; save the adapter again with save_pretrained")
    if "processor_config.json" in publication.files:  # an adapter that PEFT itself saved comes without
        _add_code(publication, folder)
    if base is not None:
        name, _, revision = base.partition("@")
        check_repo_id(name)
        config.update(base_model_name_or_path=name, revision=revision or None)
        publication.files[ADAPTER_CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("utf-8")
    elif not _can_be_on_hub(local):
        raise ValueError(
            f"the base of this adapter is a folder on this computer ({Path(local).name or 'not recorded'}), which "
            "nobody else has; publish that first and name it with --base namespace/name, or publish the complete "
            "model with --merge"
        )
    parameters, dtypes = _check_weights(folder, publication)
    sources = read_sources(Path(local)) if local and os.path.isdir(local) else []
    text = adapter_card(
        folder,
        repo_id,
        license or derive_license(sources),
        config=config,
        sources=sources,
        parameters=parameters,
        dtypes=dtypes,
        language=language,
    )
    publication.files[CARD_FILE] = str(text).encode("utf-8")
    return publication


def _can_be_on_hub(name: str) -> bool:
    if os.path.isdir(name):
        return False
    try:
        check_repo_id(name)
    except ValueError:
        return False
    return True


def prepare_model(
    folder: Path, repo_id: str, license: License | None, language: Sequence[str], base: str | None
) -> Publication:
    """
    Collects and checks the files of a MiniGPT-4 checkpoint, and writes its card.

    Args:
        folder, repo_id, license, language, base: As for [`~publish.push_to_hub`].

    Raises:
        ValueError: for another model, an incomplete one, and trained modules whose base is not on the Hub.
    """
    check_checkpoint_files(folder)
    config = with_current_keys(read_facts(folder, "config.json"))
    if config.get("model_type") != "minigpt4":
        found = f"a {config['model_type']!r} config" if config.get("model_type") else "no config.json"
        raise ValueError(f"{folder} is not a MiniGPT-4 checkpoint: it has {found}; name the folder that was saved")
    publication = Publication(repo_id, "model", {})
    _collect(folder, publication)
    _add_code(publication, folder)
    config_bytes = _with_public_base(config, base)
    if config_bytes is not None:
        publication.files["config.json"] = config_bytes
        config = json.loads(config_bytes)
    parameters, dtypes = _check_weights(folder, publication)
    if not config.get("base_checkpoints"):
        read_config = MiniGPT4Config.from_pretrained(folder)
        check_fits(MiniGPT4ForConditionalGeneration, read_config, LazyTensors(checkpoint_files(str(folder))), folder)
    sources = [*read_sources(folder), *_base_sources(config)]
    text = model_card(
        folder,
        repo_id,
        license or derive_license(sources),
        sources=sources,
        parameters=parameters,
        dtypes=dtypes,
        complete=not config.get("base_checkpoints"),
        language=language,
    )
    publication.files[CARD_FILE] = str(text).encode("utf-8")
    return publication


def _collect(folder: Path, publication: Publication) -> None:
    """Adds the files that are published, without code, and `run.json` without private folders; why others are not."""
    for path in sorted(folder.iterdir()):
        reason = _reason_to_leave(path)
        if reason is None:
            names = sorted(path.glob("*.jinja")) if path.is_dir() else [path]
            publication.files |= {file.relative_to(folder).as_posix(): file for file in names}
        else:
            publication.left_out[path.name + "/" * path.is_dir()] = reason
    if RUN_FILE in publication.files:
        publication.files[RUN_FILE] = (json.dumps(read_run(folder), indent=1) + "\n").encode("utf-8")


def _reason_to_leave(path: Path) -> str | None:
    """Why an entry of a checkpoint folder is not published; `None` for one that is."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return None if path.name == _TEMPLATE_FOLDER else "a folder"
    if path.suffix in _PICKLES:
        return "a pickle; weights are published as safetensors"
    if path.name == CARD_FILE:
        return "replaced by the generated card; keep yours with --card"
    if path.name in _TRAINER_FILES:
        return "state of a training run"
    if path.suffix == ".json" and _SECRET_NAMES.fullmatch(path.name):
        return "a secret, by its name"
    if path.suffix == ".py":
        return "code that the checkpoint does not name"  # what it names is added later
    if path.suffix in {WEIGHTS, ".json", ".jinja"} or _PLAIN_NAMES.fullmatch(path.name):
        return None
    return "not part of a checkpoint"


def _add_code(publication: Publication, folder: Path) -> None:
    """Adds the modules that the configs name, and what these import; from this package if the folder lacks them."""
    modules = {
        module for name in publication.files if name.endswith(".json") for module in _modules(publication, name)
    }
    if not modules:
        raise ValueError(
            f"no config in {folder} names the model's code (auto_map), so that nobody without this package could load "
            "it; save it again with save_pretrained of this package"
        )
    while modules:
        module = modules.pop()
        name = f"{module}.py"
        places = (folder, _PACKAGE / "modeling", _PACKAGE / "processing")
        path = next((place / name for place in places if (place / name).is_file()), None)
        if path is None:
            raise ValueError(f"{folder} names code in {name}, which is not there; save the checkpoint again")
        publication.files[name] = path
        publication.left_out.pop(name, None)
        modules |= {found for found in _relative_imports(path) if f"{found}.py" not in publication.files}


def _relative_imports(path: Path) -> set[str]:
    """Modules of the same folder that a file imports, as `from .x import y`."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module}


def _modules(publication: Publication, name: str) -> set[str]:
    """Modules named by `auto_map` and `custom_pipelines` of a JSON file."""
    if "/" in name or not name.endswith("config.json"):
        return set()
    try:
        config = json.loads(publication.read(name))
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}); save the checkpoint again") from error
    entries: list[str | list[str] | None] = list((config.get("auto_map") or {}).values())
    entries += [task.get("impl") for task in (config.get("custom_pipelines") or {}).values()]
    flat = [one for entry in entries for one in (entry if isinstance(entry, list) else [entry]) if one]
    foreign = sorted(one for one in flat if "--" in one)
    if foreign:
        raise ValueError(
            f"{name} refers to code elsewhere ({foreign[0]}); import transformers_minigpt4, load the checkpoint and "
            "save it again, so that it contains the code"
        )
    return {one.rsplit(".", 1)[0] for one in flat}


def _check_weights(folder: Path, publication: Publication) -> tuple[int, list[str]]:
    """Opens every safetensors file; returns the number of parameters, and their types, the commonest first."""
    weights = [name for name in publication.files if name.endswith(WEIGHTS)]
    index = read_facts(folder, _INDEX)
    missing = sorted(set(index.get("weight_map", {}).values()) - set(weights))
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {_INDEX} names; copy or save it again")
    if not weights:
        raise ValueError(f"{folder} contains no safetensors weights; save the checkpoint with save_pretrained")
    counts: Counter[str] = Counter()
    for name in weights:
        try:
            # Opening checks the header against the size of the file.
            with safe_open(folder / name, framework="pt"):
                counts.update(parse_local_safetensors_file_metadata(folder / name).parameter_count)
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is not a complete safetensors file ({error}); save it again") from error
    return counts.total(), [dtype for dtype, _ in counts.most_common()]


def _base_sources(config: JsonObject) -> list[JsonObject]:
    """The bases of a checkpoint of trained modules, in the format of `minigpt4_sources.json`."""
    return [
        {
            "part": "base",
            "id": base["name_or_path"],
            "revision": base.get("revision"),
            "sha256": f"{base['fingerprint']} (of samples)" if base.get("fingerprint") else None,
        }
        for base in config.get("base_checkpoints") or []
    ]


def _local_bases(config: JsonObject) -> list[JsonObject]:
    bases = config.get("base_checkpoints") or []
    return [entry for entry in bases if entry.get("revision") is None or os.path.isabs(entry["name_or_path"])]


def _with_public_base(config: JsonObject, base: str | None) -> bytes | None:
    """
    `config.json` with the local base of trained modules renamed to `base`; `None` if it need not change.

    Loading compares the base's content with the record, so a wrong name is detected there.
    """
    local = _local_bases(config)
    if base is None:
        if local:
            names = ", ".join(Path(entry["name_or_path"]).name for entry in local)
            raise ValueError(
                f"the base of these trained modules is a folder on this computer ({names}), which nobody else has; "
                "publish that first and name it with --base namespace/name, or publish the complete model with --merge"
            )
        return None
    if len(local) != 1:
        raise ValueError(f"--base {base} replaces one local base, but the checkpoint has {len(local)}; leave it out")
    name, _, revision = base.partition("@")
    check_repo_id(name)
    local[0].update(name_or_path=name, revision=revision or MAIN)
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("utf-8")
