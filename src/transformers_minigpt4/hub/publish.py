"""Publishes checkpoints and datasets on the Hub: which files, with which card, and without secrets."""

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_from_disk
from datasets import Image as ImageFeature
from datasets.table import embed_table_storage
from huggingface_hub import get_token

from transformers_minigpt4.conversion.merge import merge_checkpoint
from transformers_minigpt4.utils.file_names import RESULTS_FILE, RUN_FILE
from transformers_minigpt4.utils.files import JsonObject

from .captions import caption_shards, read_captions
from .cards import License, dataset_card
from .cc_sbu_align import image_file, read_cc_sbu_align
from .checkpoints import check_repo_id, is_adapter, prepare_adapter, prepare_model
from .instructions import is_instructions, prepare_instructions
from .records import read_facts
from .upload import CARD_FILE, WEIGHTS, Content, Publication, Published, publish


SHARD_BYTES = 500_000_000  # what `datasets` takes, and the Hub's viewer reads well

# Formats of the keys found on machines where such models are trained; the text itself is never shown.
_SECRETS = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "an API key": re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}"),
    "a GitHub token": re.compile(rb"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,})"),
    "an AWS key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


def is_dataset(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder contains a dataset: `cc_sbu_align`, captions of `describe`, or what `save_to_disk` writes."""
    saved = any(Path(folder, name).is_file() for name in ("filter_cap.json", "dataset_dict.json", "state.json"))
    return saved or bool(caption_shards(Path(folder)))


def push_to_hub(
    source: str | os.PathLike[str] | Dataset | DatasetDict,
    repo_id: str,
    *,
    license: License | None = None,
    language: Sequence[str] = ("en",),
    card: str | None = None,
    base: str | None = None,
    merge: bool = False,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> Published:
    """
    Publishes a checkpoint folder, or a dataset, with its card, in one commit.

    Args:
        source: Folder of a MiniGPT-4 checkpoint, of a PEFT adapter for one, or of a dataset (see [`is_dataset`]); or
            the dataset itself.
        repo_id: `namespace/name`; created if it does not exist.
        license: By default derived from the recorded licenses of the bases, see [`~cards.derive_license`].
        language: ISO codes for the card.
        card: Text of a card to use instead of the one made from the records.
        base: For an adapter, and a checkpoint of trained modules, whose base is one local folder: where that is on
            the Hub, `namespace/name` or `namespace/name@revision`.
        merge: Publish the complete model that an adapter, or a checkpoint of trained modules, makes with its base.
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
            source,
            repo_id,
            Path(scratch),
            license=license,
            language=language,
            card=card,
            base=base,
            merge=merge,
            token=token,
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
    merge: bool = False,
    token: str | None = None,
) -> Publication:
    """
    Collects and checks what [`push_to_hub`] would send, without the network.

    Args:
        source, repo_id, license, language, card, base, merge, token: As for [`push_to_hub`]; the token is only looked
            for.
        scratch: Empty folder for parquet shards and merged weights, which are read when publishing.

    Raises:
        ValueError: for what cannot be published.
        OSError: for what cannot be read.
    """
    check_repo_id(repo_id)
    folder = Path(source) if isinstance(source, (str, os.PathLike)) else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}; name a checkpoint or a dataset on this computer")
    if folder is not None and is_instructions(folder):
        publication = prepare_instructions(folder, repo_id, license, language)
    elif folder is not None and not is_dataset(folder):
        if merge:
            folder = _merged(folder, base, scratch)
        prepare_files = prepare_adapter if is_adapter(folder) else prepare_model
        publication = prepare_files(folder, repo_id, license, language, base)
    else:
        if base is not None or merge:
            raise ValueError("a dataset has no base; leave out --base and --merge")
        record = read_facts(folder, RUN_FILE) if folder is not None else {}
        if folder is not None and caption_shards(folder):
            data, record = read_captions(folder, scratch / "cache")
        else:
            data = _load_dataset(folder) if folder is not None else source
        publication = _prepare_dataset(data, repo_id, license, language, record, scratch)
    if card is not None:
        publication.files[CARD_FILE] = card.encode("utf-8")
    _refuse_secrets(publication, token)
    return publication


def _merged(folder: Path, base: str | None, scratch: Path) -> Path:
    """The complete model of an adapter or of trained modules, with the records of the folder."""
    if base is not None:
        raise ValueError(f"merged weights need no base; leave out --base {base} or --merge")
    merged = merge_checkpoint(folder, scratch / "merged")
    for name in (RUN_FILE, RESULTS_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, merged / name)
    return merged


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
