"""Looks at the files of a checkpoint before libraries do, and gives one line to whatever these raise."""

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from .json_files import brief, read_json
from .text import first_line


# JSON objects that transformers and PEFT read from a checkpoint.
_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_VOCABULARIES = ("tokenizer.json", "*.model", "*vocab*", "*.tiktoken", "tekken.json")
_LARGEST_IMAGE = 2**25  # pixels; some processors count those of the complete image
AGAIN = "Download or copy it again."
PICKLE = (
    "is a pickle that contains more than weights, and loading it could run any program: refused. Take a checkpoint in "
    "safetensors format."
)


def check_checkpoint_files(checkpoint: str | os.PathLike[str], weights: bool = True) -> None:
    """
    Refuses a folder with damaged files, whose names libraries do not mention.

    Args:
        checkpoint (`str` or `os.PathLike`): A folder; anything else is left to those who load it.
        weights (`bool`, *optional*, defaults to `True`): Whether all its safetensors files must be complete.

    Raises:
        OSError: for an incomplete safetensors file.
        ValueError: for a JSON file that is no JSON object, or has values that libraries fail on later.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return
    found = {name: read_json_object(folder / name) for name in _JSON_FILES if (folder / name).is_file()}
    _check_token_ids(folder / "generation_config.json", found.get("generation_config.json", {}))
    for name in ("processor_config.json", "preprocessor_config.json"):
        _check_image_size(folder / name, found.get(name, {}))
    if "tokenizer_config.json" in found and not any(path for name in _VOCABULARIES for path in folder.glob(name)):
        raise ValueError(f"{folder} contains tokenizer_config.json, but no tokenizer.json or tokenizer.model. {AGAIN}")
    if (folder / "chat_template.jinja").is_file():
        try:
            (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / 'chat_template.jinja'} is not UTF-8 text. {AGAIN}") from error
    for path in sorted(folder.glob("*.safetensors")) if weights else ():
        try:
            with safe_open(path, framework="pt"):  # compares the header with the size of the file
                pass
        except SafetensorError as error:
            raise OSError(
                f"{path} is not a complete safetensors file ({first_line(error)}). It is truncated or damaged: "
                "download or copy it again."
            ) from error


def _pickle_in(checkpoint: str | os.PathLike[str]) -> str:
    """The file that was refused, if a folder holds only one that it can be."""
    found = [path for pattern in ("*.bin", "*.pt", "*.pth") for path in Path(checkpoint).glob(pattern)]
    return str(found[0]) if len(found) == 1 else f"A weights file of {checkpoint}"


def _check_token_ids(path: Path, settings: dict[str, object]) -> None:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(number) is int for number in ids):
            raise ValueError(f"{path}: {key} is {value!r}; it must be a token's id, or a list of ids. {AGAIN}")


def _check_image_size(path: Path, settings: dict[str, object]) -> None:
    inner = settings.get("image_processor")
    for section in (settings, inner if isinstance(inner, dict) else {}):
        for key in ("size", "crop_size"):
            size = section.get(key)
            sizes = size.values() if isinstance(size, dict) else size if isinstance(size, list) else [size]
            if not all(number is None or (type(number) is int and 1 <= number <= _LARGEST_IMAGE) for number in sizes):
                raise ValueError(f"{path}: {key} is {size!r}; it must be from 1 to {_LARGEST_IMAGE:,} pixels. {AGAIN}")


def read_json_object(path: Path) -> dict[str, object]:
    """
    The object in a JSON file.

    Raises:
        OSError: if it cannot be read.
        ValueError: for a file that contains something else; the message begins with its path.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is {brief(content)}, not a JSON object. {AGAIN}")
    return content


@contextlib.contextmanager
def loading_from(checkpoint: str | os.PathLike[str], weights: bool = True) -> Iterator[None]:
    """
    Checks a checkpoint's files, and gives one line to whatever libraries raise while they load from it.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder or Hub id.
        weights (`bool`, *optional*, defaults to `True`): Whether all its safetensors files must be complete.

    Raises:
        OSError, ValueError: for damaged files; `ValueError` also for everything else that libraries raise, except a
            lack of memory or of a package.
    """
    check_checkpoint_files(checkpoint, weights)
    try:
        yield
    except (OSError, ValueError, ImportError, MemoryError):
        raise
    except pickle.UnpicklingError as error:  # torch's words advise to run what is in the file
        raise ValueError(f"{_pickle_in(checkpoint)} {PICKLE}") from error
    except Exception as error:  # these libraries raise whatever a value they did not expect leads to
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which commands explain
            raise
        # The cause of these names the field, after a line that does not.
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ is not None else error
        raise ValueError(
            f"{checkpoint} cannot be loaded ({type(cause).__name__}: {first_line(cause)}). One of its files is "
            "damaged, or was written for another version: download or convert it again."
        ) from error
