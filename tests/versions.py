"""What the installed versions of other packages can do: the tests also run with the lowest that are supported."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import transformers
from packaging import version


def transformers_before(minimum: str) -> bool:
    return version.parse(transformers.__version__) < version.parse(minimum)


# An argument of `TrainingArguments`, by the name that it has from transformers 5.23 on, or the one before.
NO_CHECKPOINTING = {"gradient_checkpointing" if transformers_before("5.23") else "activation_checkpointing": False}


def needs_transformers(minimum: str) -> AbstractContextManager:
    """For `with`: what it contains works from a version of transformers on, and says so before."""
    if transformers_before(minimum):
        return pytest.raises(ValueError, match=f"needs transformers {minimum} or later")
    return nullcontext()


def enable_gradient_checkpointing(model: transformers.PreTrainedModel) -> None:
    """By the name that it has from transformers 5.23 on, or the one before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
