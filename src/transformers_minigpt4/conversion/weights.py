"""Reads tensors one at a time from safetensors and PyTorch files, and writes them as sharded safetensors."""

import hashlib
import json
import os
import pickle
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import cached_files, extract_commit_hash

from .key_maps import shorten


# The names that the safetensors format has for dtypes (its README); those with which released weights are stored.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Read, hashed, converted and written at once: small enough to stay in the caches and in memory already mapped.
_CHUNK_BYTES = 2**23
_CHUNKS_AHEAD = 4


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type, and where its bytes stand."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    stride: tuple[int, ...] | None = None  # of a tensor that is no plain block, as pickles may hold


@dataclass(frozen=True)
class Piece:
    """
    One tensor of the checkpoint to come, brought into memory when its turn comes.

    Args:
        dtype: Of the source.
        shape: Of the tensor.
        read: Gives the tensor.
        stream: Gives it in flat parts, one after the other, where it need not be whole.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    stream: Callable[[], Iterator[torch.Tensor]] | None = None

    def parts(self) -> Iterator[torch.Tensor]:
        """The tensor in flat parts."""
        if self.stream is not None:
            return self.stream()
        flat = self.read().reshape(-1)
        return iter(flat.split(_chunk_size(self.dtype)))


class Weights:
    """
    The tensors of one source, of which no more than one is read at a time.

    Memory-mapped files would count as resident, page by page, until nothing is left of the bound on memory; so bytes
    are read by their offsets.

    Args:
        label: What the source is called in messages.
        entries: Its tensors by name.
        other_keys: Names of tensors in shards that were not opened.
        revision: Commit of a source on the Hub.
    """

    def __init__(
        self,
        label: str,
        entries: Mapping[str, Entry | torch.Tensor],
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
        is_block = isinstance(entry, Entry) and entry.stride is None
        stream = (lambda: self._hashed(key, _read_parts(entry))) if is_block else None
        return Piece(entry.dtype, tuple(entry.shape), lambda: self.read(key), stream)

    def read(self, key: str) -> torch.Tensor:
        """The tensor `key`, in memory of its own."""
        entry = self.entries[key]
        tensor = _read(entry) if isinstance(entry, Entry) else entry
        deque(self._hashed(key, [tensor.contiguous()]), maxlen=0)
        return tensor

    def _hashed(self, key: str, parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        entry = self.entries[key]
        digest = hashlib.sha256(json.dumps([key, str(entry.dtype), list(entry.shape)]).encode())
        for part in parts:
            digest.update(_bytes(part))
            yield part
        self._digests[key] = digest.hexdigest()

    def digest(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of the tensors that were read, in whatever files they were."""
        return hashlib.sha256(json.dumps(sorted(self._digests.items())).encode()).hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _read(entry: Entry) -> torch.Tensor:
    if entry.stride is not None:
        span = 1 + sum((size - 1) * stride for size, stride in zip(entry.shape, entry.stride))
        block = _read(Entry(entry.dtype, (span,), entry.path, entry.offset))
        return block.as_strided(entry.shape, entry.stride).contiguous()
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    with open(entry.path, "rb", buffering=0) as file:
        file.seek(entry.offset)
        _fill(tensor, file)
    return tensor


def _read_parts(entry: Entry) -> Iterator[torch.Tensor]:
    left = torch.Size(entry.shape).numel()
    with open(entry.path, "rb", buffering=0) as file:
        file.seek(entry.offset)
        while left:
            part = torch.empty(min(left, _chunk_size(entry.dtype)), dtype=entry.dtype)
            _fill(part, file)
            left -= part.numel()
            yield part


def _fill(tensor: torch.Tensor, file: BinaryIO) -> None:
    buffer, done = _bytes(tensor), 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{file.name} ends in the middle of a tensor. It is truncated: download or copy it again.")
        done += count


def _chunk_size(dtype: torch.dtype) -> int:
    return max(1, _CHUNK_BYTES // dtype.itemsize)


def read_file(path: Path) -> Mapping[str, Entry | torch.Tensor]:
    """
    The tensors of a safetensors or PyTorch file, by name.

    PyTorch files that are not in the zip format of PyTorch 1.6 are read whole.

    Raises:
        OSError: for a file that is truncated or no such file at all.
        ValueError: for a pickle that holds more than tensors, plain containers and numbers.
    """
    if path.suffix == ".safetensors":
        return _safetensors_entries(path)
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # under another name
    return _safetensors_entries(path) if is_safetensors else _torch_entries(path)


def _safetensors_entries(path: Path) -> dict[str, Entry]:
    try:
        # Opening checks the header against the size of the file.
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, ValueError) as error:
        raise OSError(
            f"{path} is no whole safetensors file ({error}). It is truncated or damaged: download or copy it again."
        ) from error
    header.pop("__metadata__", None)
    foreign = sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys())
    if foreign:
        raise ValueError(
            f"{path} holds tensors of type {', '.join(foreign)}, which are quantised. Take the unquantised weights."
        )
    return {
        name: Entry(DTYPES[entry["dtype"]], tuple(entry["shape"]), path, 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _torch_entries(path: Path) -> dict[str, Entry | torch.Tensor]:
    loaded = load_pickle(path)
    state = unwrap(loaded, path)
    # With `map_location="meta"` torch notes where each storage stands in the file.
    if not all(isinstance(tensor.untyped_storage()._checkpoint_offset, int) for tensor in state.values()):
        return dict(unwrap(load_pickle(path, device="cpu"), path))
    entries: dict[str, Entry | torch.Tensor] = {}
    for name, tensor in state.items():
        offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
        stride = None if tensor.is_contiguous() else tuple(tensor.stride())
        entries[name] = Entry(tensor.dtype, tuple(tensor.shape), path, offset, stride)
    return entries


def load_pickle(path: Path, device: str = "meta") -> Any:
    """
    What a PyTorch file holds, with tensors that have no data by default.

    Raises:
        OSError: for a file that is truncated or no PyTorch file.
        ValueError: for one that needs more than tensors, plain containers and numbers.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise OSError(f"{path} is a compressed zip archive, not a PyTorch file. Unpack it first.")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "class" in line), "")
        raise ValueError(
            f"{path} is a pickle that holds more than weights, and loading it could run any program: refused. Take "
            f"the file from its authors, or have it saved again as safetensors. {reason.strip()}".strip()
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"{path} is no whole PyTorch file ({reason}). It is truncated or damaged: download or copy it again."
        ) from error


def unwrap(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in what a PyTorch file holds: all of it, or what stands under "model"."""
    from .key_maps import CHECKPOINT_ENTRIES

    state = loaded
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        foreign = sorted(set(map(str, loaded)) - set(CHECKPOINT_ENTRIES))
        if foreign:
            raise ValueError(f'{path} holds {shorten(foreign)} beside "model", which no released checkpoint has.')
        state = loaded["model"]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no weights, but a {type(state).__name__}. Name a file of weights.")
    foreign = sorted(str(key) for key, value in state.items() if not isinstance(value, torch.Tensor))
    if foreign:
        raise ValueError(f"{path} holds entries that are no tensors: {shorten(foreign)}. Name a file of weights.")
    return state


def open_weights(
    source: str, revision: str | None = None, wanted: Callable[[str], bool] = lambda key: True
) -> Weights:
    """
    Opens the weights of a file, a folder or a repository of the Hub.

    Args:
        source: Path or Hub id.
        revision: Branch, tag or commit on the Hub.
        wanted: Tells by its name whether a tensor is needed. Shards without any are neither fetched nor opened.

    Raises:
        OSError: where there are no weights, or a shard is missing or damaged.
        ValueError: for files that hold something else than weights.
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
        f"{label} holds no weights in a format of transformers ({SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME}, or either with "
        "an index). Check the path; weights in Meta's own format have to be converted by transformers first."
    )


def _open_shards(source: str, index: Path, revision: str | None, wanted: Callable[[str], bool]) -> Weights:
    label = describe_source(source)
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
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
    entries: dict[str, Entry | torch.Tensor] = {}
    for path in files:
        entries.update(read_file(path))
    absent = sorted(set(needed) - entries.keys())
    if absent:
        raise OSError(f"{label}: {index.name} names {shorten(absent, 4)}, which no shard holds. Download it again.")
    return Weights(label, entries, other_keys=weight_map, revision=_commit(index))


def find_file(source: str, name: str, revision: str | None = None) -> Path | None:
    """
    A file of a folder or a repository of the Hub; `None` where there is no such file in it.

    Raises:
        OSError: for a source that is neither.
    """
    try:
        path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except HFValidationError as error:
        raise OSError(f"{source!r} is neither a file, nor a folder, nor a name on the Hub.") from error
    return Path(path) if path is not None else None


def _commit(path: Path) -> str | None:
    return extract_commit_hash(str(path), None)


def describe_source(source: str) -> str:
    """A Hub id as it is, of a path the last part: what may stand in messages and records."""
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

    Reading and hashing goes on while what was read before is written.

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
    # A file goes down to the disk while the next one is made: waiting for each in turn takes a third longer.
    with ThreadPoolExecutor(max_workers=1) as disk:
        flushed = []
        for filename, names in split.filename_to_tensors.items():
            # Wide types first, so that each tensor is aligned.
            ordered = sorted(names, key=lambda name: -shapes[name].element_size())
            with open(folder / filename, "wb") as file:
                file.write(_header({name: shapes[name] for name in ordered}))
                parts = ((name, part) for name in ordered for part in pieces[name].parts())
                for name, part in _read_ahead(parts):
                    converted = _bytes(_convert(part, dtypes[name], name))
                    file.write(converted)
                    progress(len(converted))
            flushed.append(disk.submit(flush, folder / filename))
        for future in flushed:
            future.result()
    if split.is_sharded:
        parameters = sum(tensor.numel() for tensor in shapes.values())
        index = {
            "metadata": {"total_parameters": parameters, **split.metadata},
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The start of a safetensors file: the length of a JSON object, and that object, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
            f"{name} holds values up to {part.abs().max().item():.3g}, but float16 ends at 65504. Choose bfloat16 or "
            "float32."
        )
    return converted
