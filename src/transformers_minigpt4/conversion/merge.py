"""Writes the complete model of a checkpoint that contains only trained modules or a PEFT adapter."""

import os
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from transformers_minigpt4.modeling.trained_modules_minigpt4 import adapter_base
from transformers_minigpt4.utils.checkpoint_files import loading_from
from transformers_minigpt4.utils.file_names import SOURCES_FILE

from .output import check_output, output_folder
from .weight_record import save_record
from .weights import naming


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
        ValueError: for a checkpoint that is complete already, and an `output` that contains it or its base.
    """
    output = Path(output).resolve()
    is_adapter = (Path(source) / ADAPTER_CONFIG).is_file()
    base = adapter_base(source) if is_adapter else str(source)
    with naming(base), loading_from(base):
        checkpoints = (
            getattr(AutoConfig.from_pretrained(base, trust_remote_code=False), "base_checkpoints", None) or []
        )
    if not checkpoints and not is_adapter:
        raise ValueError(f"{source} is a complete checkpoint already: there is nothing to merge.")
    places = [str(source), base, *(checkpoint["name_or_path"] for checkpoint in checkpoints)]
    check_output(output, places, overwrite)

    with loading_from(base):
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(base, trust_remote_code=False)
    if is_adapter:
        with loading_from(source):
            model = PeftModel.from_pretrained(model, source).merge_and_unload()

    with output_folder(output, overwrite) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for place in places:
            record = Path(place) / SOURCES_FILE
            if record.is_file():  # where the weights come from, for the card
                shutil.copyfile(record, folder / SOURCES_FILE)
                break
        save_record(folder)
    return output
