"""Publishes checkpoints and datasets on the Hub: which files, with which card, and without secrets."""

import ast
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_from_disk
from datasets import Image as ImageFeature
from datasets.table import embed_table_storage
from huggingface_hub import get_token, parse_local_safetensors_file_metadata
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from transformers_minigpt4.modeling.checkpoint_checks_minigpt4 import check_fits
from transformers_minigpt4.modeling.configuration_minigpt4 import MiniGPT4Config, with_current_keys
from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from transformers_minigpt4.modeling.trained_modules_minigpt4 import LazyTensors, checkpoint_files
from transformers_minigpt4.utils.checkpoint_files import check_checkpoint_files
from transformers_minigpt4.utils.file_names import RUN_FILE
from transformers_minigpt4.utils.files import JsonObject

from .cards import License, dataset_card, derive_license, model_card, read_facts, read_sources
from .cc_sbu_align import image_file, read_cc_sbu_align
from .upload import CARD_FILE, MAIN, WEIGHTS, Content, Publication, Published, publish


SHARD_BYTES = 500_000_000  # what `datasets` takes, and the Hub's viewer reads well

_PACKAGE = Path(__file__).parents[1]
_INDEX = "model.safetensors.index.json"
_TEMPLATE_FOLDER = "additional_chat_templates"  # the one subfolder that transformers saves
_PLAIN_NAMES = re.compile(r"tokenizer\.model|(merges|vocab)\.txt|(LICEN[CS]E|NOTICE|USE_POLICY)(\..*)?", re.IGNORECASE)
_TRAINER_FILES = {"trainer_state.json"}
_SECRET_NAMES = re.compile(r"(.*[._-])?(secrets?|credentials?|token|auth|api_?keys?|service_?account.*)\.json", re.I)
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
# Formats of the keys found on machines where such models are trained; the text itself is never shown.
_SECRETS = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "an API key": re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}"),
    "a GitHub token": re.compile(rb"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})"),
    "an AWS key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


def is_dataset(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder contains a dataset: the authors' `cc_sbu_align`, or what `save_to_disk` writes."""
    return any(Path(folder, name).is_file() for name in ("filter_cap.json", "dataset_dict.json", "state.json"))


def push_to_hub(
    source: str | os.PathLike[str] | Dataset | DatasetDict,
    repo_id: str,
    *,
    license: License | None = None,
    language: Sequence[str] = ("en",),
    card: str | None = None,
    base: str | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> Published:
    """
    Publishes a checkpoint folder, or a dataset, with its card, in one commit.

    Args:
        source: Folder of a MiniGPT-4 checkpoint or of a dataset (see [`is_dataset`]), or the dataset itself.
        repo_id: `namespace/name`; created if it does not exist.
        license: By default derived from the recorded licenses of the bases, see [`~cards.derive_license`].
        language: ISO codes for the card.
        card: Text of a card to use instead of the one made from the records.
        base: For a checkpoint of trained modules whose base is one local folder: where that is on the Hub,
            `namespace/name` or `namespace/name@revision`.
        private: Make the repository private. An existing public one is refused.
        revision: Branch, created if it does not exist; by default `main`.
        commit_message: First line of the commit.
        token: By default the one of `hf auth login` or `HF_TOKEN`.

    Raises:
        ValueError: for what cannot be published; nothing has been sent then.
        OSError: when the Hub cannot be reached or refuses. Call again to resume: what arrived is not sent again.
    """
    with tempfile.TemporaryDirectory() as scratch:
        publication = prepare(
            source, repo_id, Path(scratch), license=license, language=language, card=card, base=base, token=token
        )
        return publish(publication, private=private, revision=revision, commit_message=commit_message, token=token)


def prepare(
    source: str | os.PathLike[str] | Dataset | DatasetDict,
    repo_id: str,
    scratch: Path,
    *,
    license: License | None = None,
    language: Sequence[str] = ("en",),
    card: str | None = None,
    base: str | None = None,
    token: str | None = None,
) -> Publication:
    """
    Collects and checks what [`push_to_hub`] would send, without the network.

    Args:
        source, repo_id, license, language, card, base, token: As for [`push_to_hub`]; the token is only looked for.
        scratch: Empty folder for parquet shards, which are read when publishing.

    Raises:
        ValueError: for what cannot be published.
        OSError: for what cannot be read.
    """
    _check_repo_id(repo_id)
    folder = Path(source) if isinstance(source, (str, os.PathLike)) else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}; name a checkpoint or a dataset on this computer")
    if folder is not None and not is_dataset(folder):
        publication = _prepare_model(folder, repo_id, license, language, base)
    else:
        if base is not None:
            raise ValueError(f"a dataset has no base; leave out --base {base}")
        data = _load_dataset(folder) if folder is not None else source
        record = read_facts(folder, RUN_FILE) if folder is not None else {}
        publication = _prepare_dataset(data, repo_id, license, language, record, scratch)
    if card is not None:
        publication.files[CARD_FILE] = card.encode("utf-8")
    _refuse_secrets(publication, token)
    return publication


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a valid name on the Hub: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no owner; write it as namespace/{repo_id}")


# Checkpoints


def _prepare_model(
    folder: Path, repo_id: str, license: License | None, language: Sequence[str], base: str | None
) -> Publication:
    check_checkpoint_files(folder)
    config = with_current_keys(read_facts(folder, "config.json"))
    if config.get("model_type") != "minigpt4":
        found = f"a {config['model_type']!r} config" if config.get("model_type") else "no config.json"
        raise ValueError(f"{folder} is not a MiniGPT-4 checkpoint: it has {found}; name the folder that was saved")
    publication = Publication(repo_id, "model", {})
    for path in sorted(folder.iterdir()):
        reason = _reason_to_leave(path)
        if reason is None:
            names = sorted(path.glob("*.jinja")) if path.is_dir() else [path]
            publication.files |= {file.relative_to(folder).as_posix(): file for file in names}
        else:
            publication.left_out[path.name + "/" * path.is_dir()] = reason
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


def _with_public_base(config: JsonObject, base: str | None) -> bytes | None:
    """
    `config.json` with the local base of trained modules renamed to `base`; `None` if it need not change.

    Loading compares the base's content with the record, so a wrong name is detected there.
    """
    bases = config.get("base_checkpoints") or []
    local = [entry for entry in bases if entry.get("revision") is None or os.path.isabs(entry["name_or_path"])]
    if base is None:
        if local:
            names = ", ".join(Path(entry["name_or_path"]).name for entry in local)
            raise ValueError(
                f"the base of these trained modules is a folder on this computer ({names}), which nobody else has; "
                "publish that first and name it with --base namespace/name, or merge and publish the complete model"
            )
        return None
    if len(local) != 1:
        raise ValueError(f"--base {base} replaces one local base, but the checkpoint has {len(local)}; leave it out")
    name, _, revision = base.partition("@")
    _check_repo_id(name)
    local[0].update(name_or_path=name, revision=revision or MAIN)
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("utf-8")


# Datasets


def _load_dataset(folder: Path) -> Dataset | DatasetDict:
    if (folder / "filter_cap.json").is_file():
        return read_cc_sbu_align(folder)
    return load_from_disk(folder)


def _prepare_dataset(
    data: Dataset | DatasetDict,
    repo_id: str,
    license: License | None,
    language: Sequence[str],
    record: JsonObject,
    scratch: Path,
) -> Publication:
    if license is None:
        raise ValueError("give the license of the dataset with --license; the data does not name it")
    splits = DatasetDict({"train": data}) if isinstance(data, Dataset) else data
    publication = Publication(repo_id, "dataset", {})
    num_bytes = {}
    for split, dataset in splits.items():
        images = [name for name, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
        texts = [name for name, feature in dataset.features.items() if getattr(feature, "dtype", None) == "string"]
        if not images or not texts or not len(dataset):
            raise ValueError(
                f"split {split!r} has {len(dataset)} rows, {len(images)} columns of images and {len(texts)} of "
                "text; an image-caption dataset has at least one of each"
            )
        for name in images:
            dataset = dataset.cast_column(name, ImageFeature())
        splits[split] = dataset
        files, num_bytes[split] = _write_shards(dataset, split, images, scratch)
        publication.files |= files
    text = dataset_card(
        splits,
        repo_id,
        license,
        record=record,
        num_bytes=num_bytes,
        download_size=sum(publication.sizes.values()),
        language=language,
    )
    publication.files[CARD_FILE] = str(text).encode("utf-8")
    return publication


def _write_shards(dataset: Dataset, split: str, images: list[str], scratch: Path) -> tuple[dict[str, Content], int]:
    """Parquet files that contain the images' own bytes, the same for the same data; and their size in memory."""
    raw = dataset.select_columns(images)
    for name in images:
        raw = raw.cast_column(name, ImageFeature(decode=False))
    total = sum(len(image_file(row[name], number)) for number, row in enumerate(raw) for name in images)
    shards = total // SHARD_BYTES + 1
    files: dict[str, Content] = {}
    num_bytes = 0
    for index in range(shards):
        shard = dataset.shard(num_shards=shards, index=index, contiguous=True).with_format("arrow")
        shard = shard.map(embed_table_storage, batched=True, batch_size=100, keep_in_memory=True).with_format(None)
        name = f"data/{split}-{index:05d}-of-{shards:05d}.parquet"
        path = scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        num_bytes += shard.to_parquet(path)
        files[name] = path
    return files, num_bytes


# Secrets


def _refuse_secrets(publication: Publication, token: str | None) -> None:
    own = {value.encode() for value in (token, get_token()) if value}
    for name in publication.files:
        if name.endswith((WEIGHTS, ".parquet", ".model")):
            continue
        text = publication.read(name)
        kind = next((kind for kind, pattern in _SECRETS.items() if pattern.search(text)), None)
        if kind is None and any(value in text for value in own):
            kind = "your own token"
        if kind is not None:
            raise ValueError(f"{name} contains what looks like {kind}; remove it there, and replace the key itself")
