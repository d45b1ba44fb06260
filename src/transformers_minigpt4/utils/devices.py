"""The device that a command runs on."""

import torch

from .text import first_line


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
