"""Checks `report_to` before anything is loaded."""

from transformers.integrations import (
    get_reporting_integration_callbacks,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)


_INSTALLED = {
    "tensorboard": is_tensorboard_available,
    "trackio": is_trackio_available,
    "wandb": is_wandb_available,
}


def check_reporters(names: str | list[str] | None) -> None:
    """
    Args:
        names (`list[str]`): The recipe's `report_to`, as `TrainingArguments` has it.

    Raises:
        ValueError: for a tracker that transformers does not know, and one whose package is not installed.
    """
    for name in [names] if isinstance(names, str) else names or []:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise ValueError(
                f"report_to: {name} is unknown; choose none, all, {', '.join(_INSTALLED)}, or another tracker of "
                "transformers."
            ) from error
        if name in _INSTALLED and not _INSTALLED[name]():
            raise ValueError(
                f"report_to: {name} needs the package {name}, which is not installed. Install it with `pip install "
                f"{name}`, or set report_to: none."
            )
