"""Positions of the tensors in a safetensors file."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import parse_local_safetensors_file_metadata


@dataclass(frozen=True)
class TensorSpan:
    """
    One tensor of a file.

    Args:
        dtype (`str`): As safetensors spells it, such as `"BF16"`.
        shape (`tuple[int, ...]`): Its shape.
        begin (`int`): Offset in the file, in bytes, of the first byte.
        end (`int`): Offset behind the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def tensor_spans(path: Path) -> dict[str, TensorSpan]:
    """
    Every tensor of a safetensors file, without reading them.

    Raises:
        huggingface_hub.errors.SafetensorsParsingError: for a file with a broken header.
    """
    tensors = parse_local_safetensors_file_metadata(path).tensors
    # The format has no gaps: the data reach to the end of the file.
    start = path.stat().st_size - max((info.data_offsets[1] for info in tensors.values()), default=0)
    return {
        name: TensorSpan(info.dtype, tuple(info.shape), start + info.data_offsets[0], start + info.data_offsets[1])
        for name, info in tensors.items()
    }
