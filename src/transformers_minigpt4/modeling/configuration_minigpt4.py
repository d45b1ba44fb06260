"""Configuration of MiniGPT-4: a vision tower, an optional Q-Former, a projector and a language model."""

import os
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Self, TypeAlias

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Blip2QFormerConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from .config_checks_minigpt4 import CONFIG_ERRORS, check_sizes, config_file, reason, sizes_of, value_of


# Where transformers finds the code that is saved with every checkpoint.
AUTO_MAP = {
    "AutoConfig": "configuration_minigpt4.MiniGPT4Config",
    "AutoModel": "modeling_minigpt4.MiniGPT4Model",
    "AutoModelForImageTextToText": "modeling_minigpt4.MiniGPT4ForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_minigpt4.MiniGPT4ForConditionalGeneration",
    "AutoProcessor": "processing_minigpt4.MiniGPT4Processor",
}
CUSTOM_PIPELINES = {
    task: {
        "impl": "pipeline_minigpt4.MiniGPT4ImageToTextPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
    for task in ("image-to-text", "image-text-to-text")
}

# `transformers serve` chooses the Auto class, and recognizes an image model, by these tables of class names; without
# them pipelines warn. Here, in the file that is loaded first, so that a checkpoint's own code is enough for it.
for _names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    _names.setdefault("minigpt4", "MiniGPT4ForConditionalGeneration")

# Keys of configs saved by early versions, with today's names.
OLD_KEYS = {
    "projection_layers": "projector_layers",
    "projection_hidden_act": "projector_hidden_act",
    "base_parts": "base_checkpoints",
}

DEFAULT_TOWER = {"model_type": "blip_2_vision_model"}
# LLaMA-7B has 32000 tokens; Vicuna v0 was released with the same vocabulary. One row more for the image token.
DEFAULT_LANGUAGE_MODEL = {
    "model_type": "llama",
    "vocab_size": 32001,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}

PATCHES_PER_TOKEN = 4  # without Q-Former, patches concatenated into one token (authors' `has_qformer=False`)

JsonObject: TypeAlias = dict[str, Any]
# What `base_checkpoints` lists; `strict` has no TypedDict. The keys are described in `trained_modules_minigpt4.py`.
BaseCheckpoint: TypeAlias = JsonObject


def with_current_keys(config: JsonObject) -> JsonObject:
    """
    The content of a `config.json` with today's names for the keys of early versions.

    Raises:
        ValueError: for a key that is given under both names with different values.
    """
    current = dict(config)
    for old, new in OLD_KEYS.items():
        if old not in current:
            continue
        value = current.pop(old)
        if current.setdefault(new, value) != value:
            raise ValueError(
                f"The config has {new}={current[new]!r} and, under its old name, {old}={value!r}. Keep one of the two."
            )
    return current


@strict
class MiniGPT4Config(PreTrainedConfig):
    r"""
    Configuration of [`MiniGPT4Model`] and [`MiniGPT4ForConditionalGeneration`].

    The defaults are the paper's model with Vicuna-7B: ViT-g/14 of EVA-CLIP (39 blocks, 224 pixels), BLIP-2's Q-Former
    with 32 queries, one linear layer, LLaMA-7B (arXiv 2304.10592 §3, Vision-CAIR/MiniGPT-4).

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `Blip2VisionConfig()`):
            Vision tower. Any vision backbone that `AutoModel` builds and that has `hidden_size`, `image_size` and
            `patch_size`: pass the tower's own config (`SiglipVisionConfig`), not that of a two-tower model.
        qformer_config (`Blip2QFormerConfig`, `dict` or `None`, *optional*, defaults to `Blip2QFormerConfig()`):
            Q-Former. `None` removes it (the paper's variant (a)): class and register tokens are dropped and each 4
            consecutive patches are concatenated into one token.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to LLaMA-7B with one more token):
            Language model: any decoder-only language model that `AutoModel` builds.
        num_query_tokens (`int`, *optional*, defaults to 32):
            Learned queries of the Q-Former, that is tokens per image. Unused without Q-Former.
        projector_layers (`int`, *optional*, defaults to 1):
            Linear layers between vision and language: 1 as in the paper, or 3 (its variant (b)).
        projector_hidden_act (`str`, *optional*):
            Activation between the layers when there are 3. The paper does not say whether it had one; default none.
        vision_post_layernorm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the LayerNorm after a `Blip2VisionModel`. The authors' `ln_vision` has torch's default 1e-5,
            where transformers' BLIP-2 tower uses the 1e-6 of its blocks. Other towers keep their own.
        image_token_id (`int`, *optional*, defaults to 32000):
            Id of the placeholder whose embeddings the image replaces. It has a row in the language model's vocabulary.
        base_checkpoints (`list[dict]`, *optional*):
            Set in checkpoints that hold only trained modules: the checkpoints that hold the rest, see
            `trained_modules_minigpt4.py`.
        trained_parameters (`list[str]`, *optional*):
            Names of the parameters that have been trained; in such a checkpoint, of its tensors. A complete model that
            is saved after training keeps them, as the record that stage 2 asks for.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether `lm_head` shares the input embeddings. Taken over from `text_config` when that ties them.

    Raises:
        ValueError: for sub-models that cannot work together, naming the values and what to change.

    Example:

    ```python
    >>> from transformers_minigpt4 import MiniGPT4Config

    >>> config = MiniGPT4Config()
    >>> config.image_seq_length
    32
    >>> MiniGPT4Config(qformer_config=None).image_seq_length
    64
    ```"""

    model_type = "minigpt4"
    sub_configs = {"vision_config": AutoConfig, "qformer_config": Blip2QFormerConfig, "text_config": AutoConfig}

    # Of the tower's, the Q-Former's and the language model's own classes; `dict` and `None` only as arguments.
    vision_config: Any = None
    qformer_config: Any = field(default_factory=dict)
    text_config: Any = None
    num_query_tokens: int = 32
    projector_layers: int = 1
    projector_hidden_act: str | None = None
    vision_post_layernorm_eps: float = 1e-5
    image_token_id: int = 32000
    base_checkpoints: list[BaseCheckpoint] | None = None
    trained_parameters: list[str] | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Self:
        """
        See [`~PreTrainedConfig.from_pretrained`].

        Raises:
            ValueError: for a config that no model can be built from, naming file, key and value.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except ValueError as error:
            place = config_file(pretrained_model_name_or_path)
            if str(error).startswith(place):
                raise
            raise ValueError(f"{place}: {error}") from error

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[JsonObject, JsonObject]:
        """
        See [`~PreTrainedConfig.get_config_dict`].

        Raises:
            ValueError: for a file that is no JSON object.
        """
        try:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, RecursionError, TypeError) as error:
            raise ValueError(
                f"{config_file(pretrained_model_name_or_path)}: it is not a JSON object. Copy it again from where the "
                "checkpoint came from."
            ) from error

    @classmethod
    def from_dict(cls, config_dict: JsonObject, **kwargs: Any) -> Self:
        """
        See [`~PreTrainedConfig.from_dict`]; keys of early versions (`OLD_KEYS`) are read as today's.

        Raises:
            ValueError: for a config that no model can be built from, naming file, key and value.
        """
        try:
            if not isinstance(config_dict, Mapping):
                raise ValueError(f"it is {config_dict!r:.40}, not a JSON object.")
            current = with_current_keys(config_dict)
            for key in ("vision_config", "text_config"):
                if key in current and current[key] is None:  # and not the default, as in Python
                    raise ValueError(f"{key} is null; it must be the config of a model.")
            return super().from_dict(current, **kwargs)
        except CONFIG_ERRORS as error:
            place = config_file(kwargs.get("name_or_path"))
            raise ValueError(f"{place}: {reason(error)}" if place else reason(error)) from error

    def __post_init__(self, **kwargs: Any) -> None:
        for old, new in OLD_KEYS.items():
            if old in kwargs:
                raise ValueError(f"{old} is called {new} now. Rename the argument.")
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        if not __name__.startswith("transformers_modules"):
            # Only for the remote code: `pipeline()` would ask for `trust_remote_code` although the package is here.
            kwargs.pop("custom_pipelines", None)
        check_sizes("", vars(self))
        dtype = str(self.dtype).removeprefix("torch.") if self.dtype is not None else "float32"
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}; it must be a type of torch, such as 'float16'.")
        _check_base_checkpoints(self.base_checkpoints)
        if isinstance(self.qformer_config, dict):
            self.qformer_config = {**self.qformer_config}
            width = self.vision_config.get("hidden_size") if isinstance(self.vision_config, dict) else None
            width = getattr(self.vision_config, "hidden_size", width)
            if width is not None:
                self.qformer_config.setdefault("encoder_hidden_size", width)
        self.vision_config = _sub_config("vision_config", self.vision_config, DEFAULT_TOWER)
        self.qformer_config = _sub_config("qformer_config", self.qformer_config, None)
        self.text_config = _sub_config("text_config", self.text_config, DEFAULT_LANGUAGE_MODEL)
        super().__post_init__(**kwargs)
        self._check_sub_configs()
        # Tying is a property of the language model, but transformers reads it from the outer config.
        self.tie_word_embeddings = self.tie_word_embeddings or bool(
            getattr(self.text_config, "tie_word_embeddings", False)
        )

    def _check_sub_configs(self) -> None:
        self._check_language_model()
        self._check_vision_tower()
        self._check_projector()
        for name in self.sub_configs:
            sub = getattr(self, name)
            act = getattr(sub, "hidden_act", None)
            if isinstance(act, str) and act not in ACT2FN:
                raise ValueError(f"{name}.hidden_act={act!r} is unknown to transformers. Use gelu or silu …")
            heads = value_of(sub, "num_attention_heads")
            if isinstance(heads, int) and value_of(sub, "head_dim") is None and sub.hidden_size % heads != 0:
                raise ValueError(
                    f"{name}: hidden_size={sub.hidden_size} is not a multiple of num_attention_heads={heads}."
                )
        if self.qformer_config is None:
            self._check_patches()
        context = getattr(self.text_config, "max_position_embeddings", None)
        if context is not None and self.image_seq_length >= context:
            raise ValueError(
                f"One image takes {self.image_seq_length} positions, but the language model has {context}. Use fewer "
                "queries, a smaller image, or a language model with a longer context."
            )
        if self.qformer_config is not None:
            self._check_qformer()

    def _check_language_model(self) -> None:
        text = self.text_config
        if text.is_encoder_decoder:
            raise ValueError(
                f"text_config names an encoder-decoder model ({text.model_type!r}), which cannot continue a prompt "
                "that contains image embeddings. Use a decoder-only language model, such as `llama` or `qwen3`."
            )
        if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(
                f"text_config names {text.model_type!r}, which transformers does not list as a causal language model. "
                "Use a decoder-only language model, such as `llama` or `qwen3`."
            )
        if getattr(text, "vocab_size", None) is None:
            raise ValueError(
                f"text_config ({text.model_type!r}) has no vocab_size. Pass the config of a language model alone, "
                "such as `model.config.get_text_config()` of a multimodal one."
            )
        if not 0 <= self.image_token_id < text.vocab_size:
            raise ValueError(
                f"image_token_id={self.image_token_id} is outside the language model's vocabulary of "
                f"{text.vocab_size} tokens. Set it to the image token's id; if the tokenizer gained that token, raise "
                "text_config.vocab_size as well (`resize_token_embeddings`)."
            )

    def _check_vision_tower(self) -> None:
        vision = self.vision_config
        for name in ("hidden_size", "image_size", "patch_size"):
            if getattr(vision, name, None) is None:
                raise ValueError(
                    f"vision_config ({vision.model_type!r}) has no {name}. Pass the config of a vision tower alone, "
                    "such as `SiglipVisionConfig` or `model.config.vision_config` of a two-tower model."
                )
        if hasattr(vision, "depths") or vision.model_type == "siglip2_vision_model":
            raise ValueError(
                f"{vision.model_type!r} gives no fixed sequence of patches per image. Use a plain vision transformer, "
                "such as `siglip_vision_model` (SigLIP 2 of fixed resolution is one) or `dinov3_vit`."
            )

    def _check_projector(self) -> None:
        if self.projector_hidden_act is not None and self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                f"projector_hidden_act={self.projector_hidden_act!r} is unknown to transformers. Use gelu or relu …"
            )
        if self.projector_layers not in (1, 3):
            raise ValueError(
                f"projector_layers is {self.projector_layers}; MiniGPT-4 has 1 linear layer, or 3 in variant (b)."
            )
        if self.projector_hidden_act is not None and self.projector_layers == 1:
            raise ValueError(
                f"projector_hidden_act={self.projector_hidden_act!r} has no effect with one linear layer. "
                "Set projector_layers=3 or projector_hidden_act=None."
            )

    def _check_qformer(self) -> None:
        attended, width = self.qformer_config.encoder_hidden_size, self.vision_config.hidden_size
        if attended != width:
            raise ValueError(
                f"qformer_config.encoder_hidden_size={attended} must equal vision_config.hidden_size={width}: the "
                "Q-Former attends to the tower's output."
            )
        if self.num_query_tokens < 1:
            raise ValueError(
                f"num_query_tokens={self.num_query_tokens}; a Q-Former needs at least one query. "
                "Set qformer_config=None for a model without Q-Former."
            )

    def _check_patches(self) -> None:
        if self.num_patches == 0 or self.num_patches % PATCHES_PER_TOKEN:
            raise ValueError(
                f"Without Q-Former each {PATCHES_PER_TOKEN} consecutive patches become one token, but image_size="
                f"{self.vision_config.image_size} with patch_size={self.vision_config.patch_size} gives "
                f"{self.num_patches} patches. Choose an image size that gives a multiple of {PATCHES_PER_TOKEN}."
            )

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Height and width in pixels that the vision tower takes."""
        return _pair(self.vision_config.image_size)

    @property
    def num_patches(self) -> int:
        """Patches per image, without class and register tokens."""
        height, width = self.image_height_width
        patch_height, patch_width = _pair(self.vision_config.patch_size)
        return (height // patch_height) * (width // patch_width)

    @property
    def image_seq_length(self) -> int:
        """Positions that one image takes in the language model: queries, or patches / 4 without Q-Former."""
        return self.num_query_tokens if self.qformer_config is not None else self.num_patches // PATCHES_PER_TOKEN

    @classmethod
    def default_config_fields(cls) -> JsonObject:
        """From transformers 5.20: defaults that `to_diff_dict` may leave out; of the sub-configs, none."""
        return {**super().default_config_fields(), **{name: {} for name in cls.sub_configs}}

    def to_dict(self) -> JsonObject:
        output = super().to_dict()
        output["custom_pipelines"] = CUSTOM_PIPELINES
        return output


def _sub_config(
    name: str, given: PreTrainedConfig | JsonObject | None, default: JsonObject | None
) -> PreTrainedConfig | None:
    """
    Makes a config of a dict, after a look at its sizes; transformers would not say which of them is wrong.

    Args:
        name (`str`): Its key in the outer config.
        given (`PreTrainedConfig`, `dict` or `None`): What was passed.
        default (`dict`): What `None` means, and the model type of a dict that names none; `None` if it means none.

    Raises:
        ValueError: for a config that cannot be made, naming key and value.
    """
    if given is None:
        given = default
    if isinstance(given, dict):
        check_sizes(name, given)
        try:
            if default is None:
                given = Blip2QFormerConfig(**given)
            else:
                given = AutoConfig.for_model(**{"model_type": default["model_type"], **given})
        except CONFIG_ERRORS as error:
            raise ValueError(f"{name}: {reason(error)}") from error
    elif given is not None and not isinstance(given, PreTrainedConfig):
        raise ValueError(f"{name} is {given!r}; it must be the config of a model.")
    if given is not None:
        check_sizes(name, sizes_of(given))  # under whatever names the class has them
    return given


def _check_base_checkpoints(records: list[BaseCheckpoint] | None) -> None:
    for record in records or []:
        prefixes = record.get("prefixes")
        if not (
            all(isinstance(record.get(key), str) for key in ("name_or_path", "fingerprint"))
            and isinstance(record.get("revision"), str | None)
            and isinstance(prefixes, Mapping)
            and all(isinstance(text, str) for pair in prefixes.items() for text in pair)
        ):
            raise ValueError(
                "base_checkpoints is damaged: every entry has name_or_path, revision, prefixes and fingerprint. Copy "
                "config.json again from where the checkpoint came from."
            )


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


__all__ = ["MiniGPT4Config"]
