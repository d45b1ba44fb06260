"""Models that generate text: what is used of them, where they are, and the device that they run on."""

import os
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.generation.utils import GenerateOutput

from .text import first_line


class GenerativeModel(Protocol):
    """A model that generates text; every causal or image-text-to-text model of transformers is one."""

    @property
    def generation_config(self) -> GenerationConfig: ...

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def generate(self, **kwargs: Any) -> torch.Tensor | GenerateOutput: ...


def check_is_folder(checkpoint: str, otherwise: str = "") -> None:
    """
    Refuses a path without a folder, which transformers would take for a Hub id and complain about its characters.

    Args:
        checkpoint (`str`): A folder or a Hub id.
        otherwise (`str`, *optional*): What else to do; the end of the message.

    Raises:
        ValueError: for a path that is absolute or begins with a dot, if there is no such folder.
    """
    if (os.path.isabs(checkpoint) or checkpoint.startswith(".")) and not os.path.isdir(checkpoint):
        raise ValueError(f"there is no model folder {checkpoint!r}; check the path{otherwise}")


def usable_device(device: str | None) -> str:
    """
    A device as `device_map` takes it, tried first.

    Args:
        device (`str`, *optional*): Such as `"cpu"` or `"cuda:1"`, or `"auto"`, which spreads a model over all
            accelerators. By default the first accelerator, else the CPU.

    Raises:
        ValueError: for a device that torch does not have.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return str(accelerator) if accelerator is not None else "cpu"
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # an unknown device, and a torch built without CUDA
            raise ValueError(
                f"cannot use the device {device!r}: {first_line(error)}; name one that torch finds "
                "here, or leave it out"
            ) from error
    return device
