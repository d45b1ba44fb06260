"""Loads an image-text-to-text model of any family for inference, with its processor."""

import os

from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from transformers_minigpt4.utils.checkpoint_files import loading_from
from transformers_minigpt4.utils.models import GenerativeModel, check_is_folder, usable_device
from transformers_minigpt4.utils.text import first_line


def load_model_and_processor(
    checkpoint: str, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> tuple[GenerativeModel, ProcessorMixin]:
    """
    Load an image-text-to-text model of any family for inference, with its processor.

    Args:
        checkpoint (`str`): a folder or a Hub id.
        dtype (`str`, *optional*, defaults to `"auto"`): `"auto"` for the checkpoint's own, or `"float32"` and so on.
        device (`str`, *optional*): such as `"cpu"` or `"cuda:1"`; `"auto"` spreads the model over all accelerators.
            By default the first accelerator if there is one, else the CPU.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether to run code from the checkpoint.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: the model in evaluation mode, and its processor.

    Raises:
        ValueError: if the checkpoint cannot be found or is of another kind, or torch has no such device.
    """
    device = usable_device(device)
    check_is_folder(checkpoint)
    try:
        with loading_from(checkpoint):
            processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
            model = AutoModelForImageTextToText.from_pretrained(
                checkpoint, dtype=dtype, device_map=device, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        message = f"cannot load {checkpoint!r} as an image-text-to-text model on {device!r}: {first_line(error)}"
        if os.path.isdir(checkpoint):
            raise ValueError(message) from error
        raise ValueError(f"{message}; give a folder or Hub id that holds such a model and its processor") from error
    return model.eval(), processor
