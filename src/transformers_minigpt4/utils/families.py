"""The model families that training and conversion know, as plain strings: looking one up imports nothing."""

from collections.abc import Mapping
from dataclasses import dataclass


# What a stage can train: the names for a recipe's `trainable_modules`.
PROJECTOR, QFORMER, LANGUAGE_MODEL, LORA = "projector", "qformer", "language_model", "lora"
TRAINABLE_MODULES = (PROJECTOR, QFORMER, LANGUAGE_MODEL, LORA)


@dataclass(frozen=True)
class ModelFamily:
    """
    What training and conversion need to know about one `config.model_type`.

    Args:
        name (`str`): For messages.
        modules (`Mapping[str, tuple[str, ...]]`):
            Attribute paths from the generation class, by name of the trainable module; a variant may lack some. LoRA
            adapters are found by their own names.
        image_modules (`tuple[str, ...]`, *optional*):
            Attributes of the base model on which image features in front of the projector depend. Empty where such
            features cannot be cached.
        encoder_decoder (`bool`, *optional*, defaults to `False`):
            Whether answers have a decoder of their own, so that rows can be neither packed nor trained by TRL's
            `SFTTrainer`, and logits cannot be limited to labels.
        records_stages (`bool`, *optional*, defaults to `False`):
            Whether a config records which modules have been trained (`trained_parameters`).
    """

    name: str
    modules: Mapping[str, tuple[str, ...]]
    image_modules: tuple[str, ...] = ()
    encoder_decoder: bool = False
    records_stages: bool = False


_LLAVA_MODULES = {
    PROJECTOR: ("model.multi_modal_projector",),
    LANGUAGE_MODEL: ("model.language_model", "lm_head"),
}

MINIGPT4 = ModelFamily(
    "MiniGPT-4",
    {**_LLAVA_MODULES, QFORMER: ("model.qformer", "model.query_tokens")},
    image_modules=("vision_tower", "qformer", "query_tokens"),
    records_stages=True,
)
LLAVA = ModelFamily("LLaVA", _LLAVA_MODULES, image_modules=("vision_tower",))
# With FlanT5; its variant with OPT, a decoder alone, is refused by training.
BLIP2 = ModelFamily(
    "BLIP-2",
    {
        PROJECTOR: ("language_projection",),
        QFORMER: ("qformer", "query_tokens"),
        LANGUAGE_MODEL: ("language_model",),
    },
    encoder_decoder=True,
)
# Most vision-language models of transformers are shaped like LLaVA.
OTHER = ModelFamily("another family", _LLAVA_MODULES)

FAMILIES: Mapping[str, ModelFamily] = {
    "minigpt4": MINIGPT4,
    "llava": LLAVA,
    "llava_linear": LLAVA,  # with the article's projector
    "blip-2": BLIP2,
}


def family_of(config: object) -> ModelFamily:
    """
    The family of a model, by the `model_type` of its config; [`OTHER`] for a type that is not in the table.

    Args:
        config (`PreTrainedConfig`): Config of the complete model.
    """
    return FAMILIES.get(str(getattr(config, "model_type", None)), OTHER)
