"""Reads tensors one at a time from safetensors and PyTorch files."""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import torch
from huggingface_hub.errors import SafetensorsParsingError
from safetensors import SafetensorError, safe_open

from transformers_minigpt4.utils.safetensors_files import tensor_spans
from transformers_minigpt4.utils.text import first_line

from .key_maps import CHECKPOINT_ENTRIES, shorten


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
# Read, hashed, converted and written at once: small enough to stay in the caches and in memory already mapped.
_CHUNK_BYTES = 2**23
_MAPPED_BYTES = 2**26
# What torch raises for a file that is not as it should be.
_DAMAGES = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError)


@dataclass(frozen=True)
class Block:
    """
    A tensor whose bytes are in one piece, read by their offset.

    A memory-mapped file would count as resident, page by page, until nothing is left of the bound on memory.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int

    def read(self) -> torch.Tensor:
        """The tensor, contiguous and in its own memory."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            _fill(tensor, file)
        return tensor

    def parts(self) -> Iterator[torch.Tensor]:
        """The tensor in flat parts, which must not be changed."""
        left = torch.Size(self.shape).numel()
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            while left:
                part = torch.empty(min(left, chunk_size(self.dtype)), dtype=self.dtype)
                _fill(part, file)
                left -= part.numel()
                yield part


class TorchFile:
    """
    The tensors of a PyTorch file, memory-mapped.

    Pages count as resident from the first access until the mapping is closed, so the file is mapped anew after every
    64 MiB. Files that are not in the zip format of PyTorch 1.6 cannot be mapped and are read completely.

    Raises:
        OSError: for a file that is truncated or not a PyTorch file.
        ValueError: for a pickle that contains more than tensors, plain containers and numbers.
    """

    def __init__(self, path: Path):
        self.path = path
        self.is_mapped = zipfile.is_zipfile(path)
        self.state = unwrap(load_pickle(path), path)
        self._touched = 0

    def tensor(self, key: str) -> torch.Tensor:
        if self.is_mapped and self._touched > _MAPPED_BYTES:
            self.state, self._touched = unwrap(load_pickle(self.path), self.path), 0
        tensor = self.state[key]
        self._touched += tensor.nbytes
        return tensor


@dataclass(frozen=True)
class TorchEntry:
    """A tensor of a PyTorch file, a view of whatever kind."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: TorchFile
    key: str

    def read(self) -> torch.Tensor:
        """The tensor, contiguous and in its own memory."""
        return self.file.tensor(self.key).clone(memory_format=torch.contiguous_format)

    def parts(self) -> Iterator[torch.Tensor]:
        """The tensor in flat parts, which must not be changed."""
        yield from flat_parts(self.file.tensor(self.key))


Entry: TypeAlias = Block | TorchEntry


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def flat_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor in flat parts of at most 8 MiB."""
    return iter(tensor.reshape(-1).split(chunk_size(tensor.dtype)))


def chunk_size(dtype: torch.dtype) -> int:
    """Values in 8 MiB."""
    return max(1, _CHUNK_BYTES // dtype.itemsize)


def _fill(tensor: torch.Tensor, file: BinaryIO) -> None:
    buffer, done = memory_of(tensor), 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        if not count:
            raise OSError(f"{file.name} ends in the middle of a tensor. It is truncated: download or copy it again.")
        done += count


def read_file(path: Path) -> Mapping[str, Entry]:
    """
    The tensors of a safetensors or PyTorch file, by name.

    Raises:
        OSError: for a file that is truncated or neither of the two.
        ValueError: for a pickle that contains more than tensors, plain containers and numbers.
    """
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # maybe under another name
    if is_safetensors or path.suffix == ".safetensors":
        return _safetensors_entries(path)
    torch_file = TorchFile(path)
    return {
        name: TorchEntry(tensor.dtype, tuple(tensor.shape), torch_file, name)
        for name, tensor in torch_file.state.items()
    }


def _safetensors_entries(path: Path) -> dict[str, Entry]:
    try:
        # Opening checks the header against the size of the file.
        with safe_open(path, framework="pt"):
            pass
        spans = tensor_spans(path)
    except (SafetensorError, SafetensorsParsingError) as error:
        raise OSError(
            f"{path} is not a complete safetensors file ({error}). It is truncated or damaged: download or copy it "
            "again."
        ) from error
    foreign = sorted({span.dtype for span in spans.values()} - DTYPES.keys())
    if foreign:
        raise ValueError(
            f"{path} contains tensors of type {', '.join(foreign)}, which are quantized. Take the unquantized weights."
        )
    return {name: Block(DTYPES[span.dtype], span.shape, path, span.begin) for name, span in spans.items()}


def load_pickle(path: Path) -> object:
    """
    What a PyTorch file contains, on the CPU, and memory-mapped if it is in the zip format.

    Raises:
        OSError: for a file that is truncated or not a PyTorch file.
        ValueError: for one that needs more than tensors, plain containers and numbers.
    """
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise OSError(f"{path} is a compressed zip archive, not a PyTorch file. Unpack it first.")
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        # torch's own words advise to allow what the file wants to run.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        wanted = f"It asks for {found[1]}. " if found is not None else ""
        raise ValueError(
            f"{path} is a pickle that contains more than weights, and loading it could run any program: refused. "
            f"{wanted}Take the file from its authors, or have it saved again as safetensors."
        ) from error
    except (*_DAMAGES, ValueError) as error:
        raise OSError(
            f"{path} is not a complete PyTorch file ({first_line(error)}). It is truncated or damaged: download or "
            "copy it again."
        ) from error
    return loaded


def unwrap(loaded: object, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in what a PyTorch file contains: all of it, or what is under "model"."""
    state = loaded
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        foreign = sorted(set(map(str, loaded)) - set(CHECKPOINT_ENTRIES))
        if foreign:
            raise ValueError(
                f'{path} contains {shorten(foreign)} in addition to "model", which no released checkpoint does.'
            )
        state = loaded["model"]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} contains no weights, but a {type(state).__name__}. Name a file of weights.")
    foreign = sorted(str(key) for key, value in state.items() if not isinstance(value, torch.Tensor))
    if foreign:
        raise ValueError(f"{path} contains entries that are not tensors: {shorten(foreign)}. Name a file of weights.")
    return state
