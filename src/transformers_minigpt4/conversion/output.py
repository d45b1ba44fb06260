"""Writes a converted or merged checkpoint: weights, configs, remote code and the record of its sources."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save

from transformers_minigpt4.utils.file_names import SOURCES_FILE
from transformers_minigpt4.utils.files import atomic_folder, flush_folder
from transformers_minigpt4.utils.text import first_line

from .sources import Source
from .weights import Piece, save_pieces


def check_output(output: Path, sources: Sequence[str | None], overwrite: bool) -> None:
    """
    Refuses a folder that must not be replaced.

    Raises:
        FileExistsError: for a file, and for a folder with content unless `overwrite`.
        ValueError: for a folder that contains one of the sources.
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file. Name a new folder.")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(f"{output} exists and is not empty. Name a new folder, or replace it with --overwrite.")
    for source in filter(None, sources):
        if output.exists() and Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"{source} is, or is inside, the output folder {output}, which would be replaced. Name another."
            )


@contextmanager
def output_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """
    A folder next to `output` that replaces it at the end, when it is on the disk, or vanishes on an error.

    Raises:
        FileExistsError: without `overwrite`, when something else has filled `output` in the meantime.
        OSError: when the disk is full.
    """
    try:
        with atomic_folder(output, overwrite=overwrite) as folder:
            yield folder
            flush_folder(folder)
    except SafetensorError as error:  # while writing: what is read has been checked
        raise OSError(f"writing {output} failed ({first_line(error)}); nothing of it is left") from error
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, f"writing {output} failed ({error.strerror}); nothing of it is left") from error
        raise


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pieces: Mapping[str, Piece],
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: str | int,
    show_progress: bool,
) -> None:
    """
    Writes what `save_pretrained` of model and processor would write.

    Args:
        folder: An empty folder.
        model: On the meta device; the weights are those of `pieces`.
        processor: To save with it.
        pieces: Tensors by name.
        dtypes: Types by name to store them with.
        max_shard_size: Bytes of the largest file, such as `"5GB"`.
        show_progress: Show a progress bar on stderr.

    Raises:
        OSError: if the disk is too full.
    """
    size = sum(dtypes[name].itemsize * torch.Size(piece.shape).numel() for name, piece in pieces.items())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"The checkpoint takes {size / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free. Free some "
            "space, or name a folder on another disk."
        )
    # disable=None: no bar if stderr is a file.
    with tqdm(total=size, unit="B", unit_scale=True, disable=None if show_progress else True) as bar:
        save_pieces(folder, pieces, dtypes, max_shard_size, bar.update)
    config = model.config
    config.dtype = str(config.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if type(model)._auto_class is not None:  # transformers has the code of its own models
        custom_object_save(model, folder)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.tokenizer.name_or_path = ""
    processor.save_pretrained(folder)


def save_sources(folder: Path, sources: Sequence[Source], settings: Mapping[str, object]) -> None:
    """Records where the weights came from. `sha256` is that of the tensors read, see `Weights.digest`."""
    rows = [
        {
            "part": role,
            "id": weights.label,
            "revision": weights.revision,
            "sha256": weights.digest(),
            "license": license_id,
        }
        for source in sources
        for role, weights, license_id in source.origins
    ]
    record = {"sources": rows, "settings": {key: value for key, value in settings.items() if value is not None}}
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (folder / SOURCES_FILE).write_text(text, encoding="utf-8")
