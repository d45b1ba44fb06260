"""Loading and saving: complete checkpoints, PEFT adapters, and checkpoints that hold only trained modules."""

import os
import pickle
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation.configuration_utils import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .checkpoint_checks_minigpt4 import LoadingInfo, check_complete, check_fits
from .configuration_minigpt4 import JsonObject, MiniGPT4Config
from .quantization_minigpt4 import without_odd_layers
from .trained_modules_minigpt4 import (
    HubOptions,
    LazyTensors,
    NoSafetensorsError,
    PathLike,
    adapter_base,
    assemble,
    checkpoint_files,
    commit_of,
    save_trained_modules,
)


# With these, transformers reads something else than a checkpoint's safetensors files.
_OTHER_WEIGHTS = ("state_dict", "gguf_file", "variant")


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
            ValueError: for a config that no model can be built from; for a checkpoint that lacks parameters or has
                others, where transformers would warn and continue with random ones; and for parameters of other
                shapes, which `ignore_mismatched_sizes=True` accepts, as it does there.
            OSError: for files that are missing, incomplete, or no safetensors files.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        name, config = pretrained_model_name_or_path, kwargs.get("config")
        if name is not None and config is None and os.path.isfile(os.path.join(name, "adapter_config.json")):
            # Auto classes have looked up the base of a PEFT adapter already.
            kwargs["adapter_kwargs"] = {**(kwargs.get("adapter_kwargs") or {}), "_adapter_model_path": name}
            name = adapter_base(name)
        hub_options = {key: kwargs[key] for key in HubOptions.__annotations__ if key in kwargs}
        if isinstance(config, (str, os.PathLike)):
            config = kwargs["config"] = MiniGPT4Config.from_pretrained(config)
        elif config is None and name is not None:
            config = MiniGPT4Config.from_pretrained(name, **hub_options)
        if config is not None:
            kwargs = without_odd_layers(cls, config, kwargs)
        if getattr(config, "base_checkpoints", None):
            kwargs["config"] = config
            model, info = cls._load_trained_modules(str(name), hub_options, *model_args, **kwargs)
        else:
            if config is not None and name is not None:
                cls._check_files(str(name), config, hub_options, kwargs)
            model, info = cls._load(name, *model_args, **kwargs)
        check_complete(cls, pretrained_model_name_or_path, info)
        if name is not None and not os.path.isdir(name):
            model._base_revision = commit_of(str(name), **hub_options)
        if wants_info:
            return model, info  # type: ignore[return-value]  # transformers' own annotation leaves this out
        return model

    @classmethod
    def _check_files(cls, name: str, config: MiniGPT4Config, hub_options: JsonObject, options: JsonObject) -> None:
        """Compares a complete checkpoint's files with its config, before anything is loaded."""
        quantized = getattr(config, "quantization_config", None) is not None  # packed weights have other shapes
        if quantized or any(options.get(key) is not None for key in _OTHER_WEIGHTS):
            return
        try:
            files = checkpoint_files(name, **hub_options)
        except NoSafetensorsError:
            return  # transformers may know the format
        check_fits(cls, config, LazyTensors(files), name, **_check_options(options))

    @classmethod
    def _load(cls, name: PathLike | None, *model_args: object, **kwargs: Any) -> tuple[Self, LoadingInfo]:
        """transformers' own loading, with the names of missing and unexpected parameters."""
        try:
            loaded: Any = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
        except pickle.UnpicklingError as error:  # whose words advise to run what is in the file
            found = list(Path(str(name)).glob("*.bin"))
            file = str(found[0]) if len(found) == 1 else f"A weights file of {name}"
            raise ValueError(
                f"{file} is a pickle that contains more than weights, and loading it could run any "
                "program: refused. Take a checkpoint in safetensors format."
            ) from error
        model, info = loaded
        return model, info

    @classmethod
    def _load_trained_modules(
        cls, name: str, hub_options: JsonObject, *model_args: object, **kwargs: Any
    ) -> tuple[Self, LoadingInfo]:
        """Loads a checkpoint that holds only trained modules, together with its base checkpoints."""
        # Revision and subfolder are those of the checkpoint itself, not of the bases.
        shared = {key: value for key, value in hub_options.items() if key not in ("revision", "subfolder")}
        config = kwargs["config"]
        state_dict = assemble(config.base_checkpoints, checkpoint_files(name, **hub_options), **shared)
        check_fits(cls, config, state_dict, name, **_check_options(kwargs))
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
        bases, self.config.base_checkpoints = self.config.base_checkpoints, None
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.base_checkpoints = bases
        if os.path.isfile(os.path.join(save_directory, SAFE_WEIGHTS_INDEX_NAME)):
            stale = os.path.join(save_directory, SAFE_WEIGHTS_NAME)  # loading would prefer it to the shards
            if os.path.isfile(stale):
                os.remove(stale)


def _check_options(options: JsonObject) -> JsonObject:
    """The options of `from_pretrained` that decide what a model must have."""
    return {key: options[key] for key in ("ignore_mismatched_sizes", "image_modules") if key in options}
