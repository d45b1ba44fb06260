"""The tensors of a source, read one at a time, and their writing as sharded safetensors."""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import HFValidationError
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_files, extract_commit_hash

from transformers_minigpt4.modeling import trained_modules_minigpt4
from transformers_minigpt4.utils.text import first_line

from .key_maps import shorten
from .tensor_files import DTYPES, Entry, flat_parts, memory_of, read_file


_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNKS_AHEAD = 4


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """
    Names a source that cannot be loaded, which the Hub's messages do not always do.

    Raises:
        OSError: for the `OSError` of a source that is neither a file nor a folder on this computer.
    """
    try:
        yield
    except OSError as error:
        if os.path.exists(source):
            raise
        raise OSError(
            f"there is no file or folder {source!r}, and the Hub has no such model or cannot be reached "
            f"({first_line(error).rstrip('.')}); check the path or Hub id"
        ) from error


@dataclass(frozen=True)
class Piece:
    """
    One tensor of the checkpoint to write, brought into memory when it is needed.

    Args:
        dtype: Of the source.
        shape: Of the tensor.
        read: Returns the tensor.
        stream: Returns it in flat parts, one after the other, if it need not be in memory completely.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    stream: Callable[[], Iterator[torch.Tensor]] | None = None

    def parts(self) -> Iterator[torch.Tensor]:
        """The tensor in flat parts."""
        if self.stream is not None:
            return self.stream()
        return flat_parts(self.read())


class Weights:
    """
    The tensors of one source, of which no more than one is read at a time.

    Args:
        label: What the source is called in messages.
        entries: Its tensors by name.
        other_keys: Names of tensors in shards that were not opened.
        revision: Commit of a source on the Hub.
    """

    def __init__(
        self,
        label: str,
        entries: Mapping[str, Entry],
        other_keys: Iterable[str] = (),
        revision: str | None = None,
    ):
        self.label = label
        self.entries = dict(entries)
        self.keys = sorted({*entries, *other_keys})
        self.revision = revision
        self._digests: dict[str, str] = {}

    def piece(self, key: str) -> Piece:
        entry = self.entries[key]
        return Piece(entry.dtype, entry.shape, lambda: self.read(key), lambda: self._hashed(key, entry.parts()))

    def read(self, key: str) -> torch.Tensor:
        """The tensor `key`, in its own memory."""
        tensor = self.entries[key].read()
        deque(self._hashed(key, [tensor]), maxlen=0)
        return tensor

    def _hashed(self, key: str, parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        entry = self.entries[key]
        digest = hashlib.sha256(json.dumps([key, str(entry.dtype), list(entry.shape)]).encode())
        for part in parts:
            digest.update(memory_of(part))
            yield part
        self._digests[key] = digest.hexdigest()

    def digest(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of the tensors that were read, in whatever files they were."""
        return hashlib.sha256(json.dumps(sorted(self._digests.items())).encode()).hexdigest()


def open_weights(
    source: str, revision: str | None = None, wanted: Callable[[str], bool] = lambda key: True
) -> Weights:
    """
    Opens the weights of a file, a folder or a repository of the Hub.

    Args:
        source: Path or Hub id.
        revision: Branch, tag or commit on the Hub.
        wanted: Whether the tensor of a name is needed. Shards without any such are neither downloaded nor opened.

    Raises:
        OSError: if there are no weights, or a shard is missing or damaged.
        ValueError: for files that contain something other than weights.
    """
    label = describe_source(source)
    if Path(source).is_file():
        return Weights(label, read_file(Path(source)))
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        path = find_file(source, single, revision)
        if path is not None:
            return Weights(label, read_file(path), revision=_commit(path))
        path = find_file(source, index, revision)
        if path is not None:
            return _open_shards(source, path, revision, wanted)
    raise OSError(
        f"{label} contains no weights in a format of transformers ({SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME}, or either "
        "with an index). Check the path; weights in Meta's own format have to be converted by transformers first."
    )


def _open_shards(source: str, index: Path, revision: str | None, wanted: Callable[[str], bool]) -> Weights:
    label = describe_source(source)
    try:
        found = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        weight_map: dict[str, str] = {key: os.fspath(shard) for key, shard in found.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{label}: {index.name} is damaged ({error!r}). Download it again.") from error
    needed = [key for key in weight_map if wanted(key)]
    shards = sorted({weight_map[key] for key in needed})
    if Path(source).is_dir():
        files = [Path(source) / shard for shard in shards]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise OSError(f"{label} lacks {len(missing)} of the shards in {index.name}: {shorten(missing)}.")
    else:
        files = [Path(path) for path in cached_files(source, shards, revision=revision) or []] if shards else []
    entries: dict[str, Entry] = {}
    for path in files:
        entries.update(read_file(path))
    absent = sorted(set(needed) - entries.keys())
    if absent:
        raise OSError(f"{label}: {index.name} names {shorten(absent, 4)}, which no shard contains. Download it again.")
    return Weights(label, entries, other_keys=weight_map, revision=_commit(index))


def find_file(source: str, name: str, revision: str | None = None) -> Path | None:
    """
    A file of a folder or a repository of the Hub; `None` if there is no such file in it.

    Raises:
        OSError: for a source that is neither.
    """
    try:
        return trained_modules_minigpt4.find_file(source, name, revision=revision)
    except HFValidationError as error:
        raise OSError(f"{source!r} is neither a file, nor a folder, nor a name on the Hub.") from error


def _commit(path: Path) -> str | None:
    return extract_commit_hash(str(path), None)


def describe_source(source: str) -> str:
    """A Hub id as it is, of a path the last part: what messages and records may show."""
    return Path(source).resolve().name if Path(source).exists() else source


def save_pieces(
    folder: Path,
    pieces: Mapping[str, Piece],
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: str | int,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """
    Writes tensors as `model.safetensors`, or as shards with an index.

    Tensors are read and hashed while those before them are written.

    Args:
        folder: An existing folder.
        pieces: Tensors by name.
        dtypes: Types by name to store them with.
        max_shard_size: Bytes of the largest file, such as `"5GB"`.
        progress: Called with the number of bytes written since the last call.

    Raises:
        ValueError: for values that fp16 cannot hold.
    """
    shapes = {name: torch.empty(piece.shape, dtype=dtypes[name], device="meta") for name, piece in pieces.items()}
    split = split_torch_state_dict_into_shards(
        shapes,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    # A file is flushed to the disk while the next one is written: waiting for each in turn takes a third longer.
    with ThreadPoolExecutor(max_workers=1) as disk:
        flushed = []
        for filename, names in split.filename_to_tensors.items():
            # Wide types first, so that each tensor is aligned.
            ordered = sorted(names, key=lambda name: -shapes[name].element_size())
            with open(folder / filename, "wb") as file:
                file.write(_header({name: shapes[name] for name in ordered}))
                parts = ((name, part) for name in ordered for part in pieces[name].parts())
                for name, part in _read_ahead(parts):
                    converted = memory_of(_convert(part, dtypes[name], name))
                    file.write(converted)
                    progress(len(converted))
            flushed.append(disk.submit(_flush, folder / filename))
        for future in flushed:
            future.result()
    if split.is_sharded:
        parameters = sum(tensor.numel() for tensor in shapes.values())
        index = {
            "metadata": {"total_parameters": parameters, **split.metadata},
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    """Waits until a file is on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The start of a safetensors file: the length of a JSON object, and that object, padded to 8 bytes."""
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_ahead(items: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The items, of which a thread makes the next few while one is in use."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = deque(reader.submit(next, items, None) for _ in range(_CHUNKS_AHEAD))
        while (item := coming.popleft().result()) is not None:
            coming.append(reader.submit(next, items, None))
            yield item


def _convert(part: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    converted = part.to(dtype)
    narrowed = dtype == torch.float16 and part.dtype != dtype
    if narrowed and bool((torch.isinf(converted) & torch.isfinite(part)).any()):
        raise ValueError(
            f"{name} has values up to {part.abs().max().item():.3g}, but float16 ends at 65504. Choose bfloat16 or "
            "float32."
        )
    return converted
