"""The entry point for lmms-eval (extra `lmms`); imports nothing until lmms-eval asks for the model."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> "ModelManifest":
    """Target of the entry point `lmms_eval.models`: names `minigpt4` and the class behind it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="minigpt4", simple_class_path=f"{__name__}_model.ImageTextToTextModel")
