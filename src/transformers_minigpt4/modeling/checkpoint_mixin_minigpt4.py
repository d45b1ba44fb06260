"""Loading and saving: complete checkpoints, PEFT adapters, and checkpoints that hold only trained modules."""

import json
import os
from collections.abc import Collection
from typing import Any, Self, TypeAlias

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation.configuration_utils import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .configuration_minigpt4 import JsonObject, MiniGPT4Config
from .trained_modules_minigpt4 import (
    HubOptions,
    PathLike,
    assemble,
    checkpoint_files,
    commit_of,
    save_trained_modules,
)


LoadingInfo: TypeAlias = dict[str, Collection[str]]


class CheckpointMixin(PreTrainedModel):
    """Extends transformers' loading and saving: no random weights, and checkpoints of trained modules."""

    _base_revision: str | None = None  # commit of the Hub repository that the model came from

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: PathLike | None, *model_args: object, **kwargs: Any
    ) -> Self:
        """
        See [`~PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: for a checkpoint that lacks parameters or has others, where transformers would warn and
                continue with random ones. `ignore_mismatched_sizes=True` accepts parameters of other shapes, as it
                does there.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        name, config = pretrained_model_name_or_path, kwargs.get("config")
        if name is not None and config is None and os.path.isfile(os.path.join(name, "adapter_config.json")):
            # Auto classes have looked up the base of a PEFT adapter already.
            with open(os.path.join(name, "adapter_config.json"), encoding="utf-8") as file:
                base = json.load(file)["base_model_name_or_path"]
            kwargs["adapter_kwargs"] = {**(kwargs.get("adapter_kwargs") or {}), "_adapter_model_path": name}
            name = base
        hub_options = {key: kwargs[key] for key in HubOptions.__annotations__ if key in kwargs}
        if config is None and name is not None:
            config = MiniGPT4Config.from_pretrained(name, **hub_options)
        if getattr(config, "base_checkpoints", None):
            kwargs["config"] = config
            model, info = cls._load_trained_modules(str(name), hub_options, *model_args, **kwargs)
        else:
            model, info = cls._load(name, *model_args, **kwargs)
        _check_complete(cls, pretrained_model_name_or_path, info)
        if name is not None and not os.path.isdir(name):
            revision = kwargs.get("revision")
            model._base_revision = getattr(revision, "resolved", None) or commit_of(str(name), revision)
        if wants_info:
            return model, info  # type: ignore[return-value]  # transformers' own annotation leaves this out
        return model

    @classmethod
    def _load(cls, name: PathLike | None, *model_args: object, **kwargs: Any) -> tuple[Self, LoadingInfo]:
        """transformers' own loading, with the names of missing and unexpected parameters."""
        loaded: Any = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
        model, info = loaded
        return model, info

    @classmethod
    def _load_trained_modules(
        cls, name: str, hub_options: JsonObject, *model_args: object, **kwargs: Any
    ) -> tuple[Self, LoadingInfo]:
        """Loads a checkpoint that holds only trained modules, together with its base checkpoints."""
        # Revision and subfolder are those of the checkpoint itself, not of the bases.
        shared = {key: value for key, value in hub_options.items() if key not in ("revision", "subfolder")}
        state_dict = assemble(kwargs["config"].base_checkpoints, checkpoint_files(name, **hub_options), **shared)
        rest = {key: value for key, value in kwargs.items() if key not in hub_options}
        adapter = (rest.pop("adapter_kwargs", None) or {}).get("_adapter_model_path")
        model, info = cls._load(None, *model_args, **rest, state_dict=state_dict)
        model.name_or_path = model.config.name_or_path = name
        if model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(name, **hub_options)
        if adapter is not None:
            model.load_adapter(adapter)
        return model, info

    def save_pretrained(self, save_directory: PathLike, *args: Any, trained_only: bool = False, **kwargs: Any) -> None:
        """
        See [`~PreTrainedModel.save_pretrained`].

        Args:
            save_directory (`str` or `os.PathLike`): Folder, created if it does not exist.
            trained_only (`bool`, *optional*, defaults to `False`):
                Write only the trained parameters, with a record of the checkpoint that the model came from. The
                folder is loaded like any other; the base must then be where it was.

        Raises:
            ValueError: with `trained_only`, for a model that has no base, or other changes than the trained ones.
        """
        if trained_only:
            if not kwargs.get("is_main_process", True):
                return
            if unknown := set(kwargs) - {"is_main_process", "safe_serialization"}:
                raise ValueError(
                    f"trained_only=True cannot be combined with {', '.join(sorted(unknown))}. Leave them out."
                )
            save_trained_modules(self, save_directory)
            custom_object_save(self, save_directory)
            return
        record = self.config.base_checkpoints, self.config.trained_parameters
        self.config.base_checkpoints = self.config.trained_parameters = None
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.base_checkpoints, self.config.trained_parameters = record
        if os.path.isfile(os.path.join(save_directory, SAFE_WEIGHTS_INDEX_NAME)):
            stale = os.path.join(save_directory, SAFE_WEIGHTS_NAME)  # loading would prefer it to the shards
            if os.path.isfile(stale):
                os.remove(stale)


def _check_complete(model_class: type[PreTrainedModel], name: PathLike | None, info: LoadingInfo) -> None:
    problems = [
        f"{len(info[kind])} {words} ({', '.join(sorted(info[kind])[:5])}{', …' if len(info[kind]) > 5 else ''})"
        for kind, words in (("missing_keys", "missing"), ("unexpected_keys", "that the model does not have"))
        if info[kind]
    ]
    if problems:
        raise ValueError(
            f"The checkpoint {name} does not fit {model_class.__name__} with its config: parameters "
            f"{' and '.join(problems)}. Take weights and config of one model, or convert the weights first."
        )
