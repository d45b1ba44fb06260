"""Writes the complete model of a checkpoint that contains only trained modules or a PEFT adapter."""

import json
import os
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_minigpt4.utils.file_names import SOURCES_FILE

from .output import check_output, output_folder


ADAPTER_CONFIG = "adapter_config.json"


def merge_checkpoint(
    source: str | os.PathLike[str], output: str | os.PathLike[str], dtype: str = "auto", *, overwrite: bool = False
) -> Path:
    """
    Combines the trained modules of a checkpoint with its base.

    Args:
        source (`str` or `os.PathLike`):
            Folder or Hub id of a checkpoint saved with `save_pretrained(…, trained_only=True)`, or folder of a PEFT
            adapter, whose weights are added to its base's.
        output (`str` or `os.PathLike`):
            New folder for the full model and its processor. It appears under this name only when it is complete.
        dtype (`str`, *optional*, defaults to `"auto"`):
            As the base is stored, or `"float32"`, `"bfloat16"`, `"float16"`.
        overwrite (`bool`, *optional*, defaults to `False`): Replace `output` if it exists.

    Returns:
        `Path`: `output`.

    Raises:
        FileExistsError: when `output` exists, unless `overwrite`.
        ValueError: for a checkpoint that is complete already, and an `output` that would replace it or its base.
    """
    output = Path(output).resolve()
    check_output(output, [], overwrite)
    adapter = Path(source) / ADAPTER_CONFIG
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
        model = PeftModel.from_pretrained(model, source).merge_and_unload()
    else:
        base = source
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
        if not getattr(model.config, "base_checkpoints", None):
            raise ValueError(f"{source} is a complete checkpoint already: there is nothing to merge.")
    places = source, base, *(checkpoint["name_or_path"] for checkpoint in model.config.base_checkpoints or [])
    if any(Path(place).resolve() == output for place in places):
        raise ValueError(f"{output} is needed to load the checkpoint. Name another folder.")
    processor = AutoProcessor.from_pretrained(base)

    with output_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for place in places:
            record = Path(place) / SOURCES_FILE
            if record.is_file():  # where the weights come from, for the card
                shutil.copyfile(record, folder / SOURCES_FILE)
                break
    return output
