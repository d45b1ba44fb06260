"""The released parts that make a checkpoint of the paper, by name: values for the options of `convert`."""

from dataclasses import asdict, dataclass
from pathlib import Path


_BLIP2 = "Salesforce/blip2-flan-t5-xxl"
# Merged Vicuna v0, to which the README of Vision-CAIR/MiniGPT-4 links.
_VICUNA_7B, _VICUNA_13B = "Vision-CAIR/vicuna-7b", "Vision-CAIR/vicuna"
_LLAMA2_7B = "meta-llama/Llama-2-7b-chat-hf"
_SIGLIP2 = "google/siglip2-so400m-patch16-256"
# The authors' projectors, by the names that their README's links download. Google Drive has no address for programs.
_DRIVE = "https://drive.google.com/file/d/{}/view"
PROJECTORS = {
    "pretrained_minigpt4_7b.pth": _DRIVE.format("1RY9jV0dyqLX-o38LrumkKRh6Jtaop58R"),
    "pretrained_minigpt4.pth": _DRIVE.format("1a4zLvaiDBr-36pasffmgpvH5P7CKmpze"),
    "pretrained_minigpt4_llama2_7b.pth": _DRIVE.format("11nAPjEok8eAGGEG1N2vXo3kBLCg0WgUk"),
}


@dataclass(frozen=True)
class Preset:
    """
    Values for options of `convert`, which has the same names; those given explicitly take precedence.

    Args:
        vision, language_model, qformer, projector: Sources.
        chat_template: Of the prompts that the projector was trained with; `None` for the tokenizer's own.
        dtype: Of the weights.
        projector_layers: Of a fresh projector.
    """

    vision: str
    language_model: str
    qformer: str
    projector: str = "fresh"
    chat_template: str | None = "vicuna_v0"
    dtype: str = "float16"
    projector_layers: int = 1


# Released models, and the bases that the recipes train (`model_name_or_path` without `minigpt4-`).
PRESETS = {
    "vicuna-7b": Preset(_BLIP2, _VICUNA_7B, _BLIP2, "pretrained_minigpt4_7b.pth"),
    "vicuna-13b": Preset(_BLIP2, _VICUNA_13B, _BLIP2, "pretrained_minigpt4.pth"),
    "llama2-7b": Preset(_BLIP2, _LLAMA2_7B, "none", "pretrained_minigpt4_llama2_7b.pth", "llama_2"),
    "vicuna-7b-base": Preset(_BLIP2, _VICUNA_7B, _BLIP2),
    "vicuna-7b-no-qformer-base": Preset(_BLIP2, _VICUNA_7B, "none"),
    "vicuna-7b-three-layers-base": Preset(_BLIP2, _VICUNA_7B, _BLIP2, projector_layers=3),
    "llama2-7b-base": Preset(_BLIP2, _LLAMA2_7B, "none", chat_template="llama_2"),
    "siglip2-qwen3-base": Preset(_SIGLIP2, "Qwen/Qwen3-8B", "none", chat_template=None, dtype="bfloat16"),
    "siglip2-smollm3-base": Preset(_SIGLIP2, "HuggingFaceTB/SmolLM3-3B", "none", chat_template=None, dtype="bfloat16"),
}


@dataclass(frozen=True)
class LlavaPreset:
    """
    Values for options of `convert --architecture llava`; `None` for what its default finds.

    Args:
        language_model, vision, projector: Sources.
        projector_layers: Of a fresh projector.
        chat_template: The authors' prompt format.
        pad_images: Whether images are padded to squares.
    """

    language_model: str
    vision: str | None = None
    projector: str = "fresh"
    projector_layers: int = 1
    chat_template: str = "llava_v1"
    pad_images: bool | None = None


# The article's base (Vicuna v0, CLIP at 224 pixels), that of version 1.5, and its released checkpoint.
LLAVA_PRESETS = {
    "llava-vicuna-7b-base": LlavaPreset(_VICUNA_7B, "openai/clip-vit-large-patch14", chat_template="llava_v0"),
    "llava15-vicuna-7b-base": LlavaPreset(
        "lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336", projector_layers=2, pad_images=True
    ),
    "llava15-7b": LlavaPreset("liuhaotian/llava-v1.5-7b"),
}


def fill_in_llava(name: str | None, given: dict[str, object]) -> dict[str, object]:
    """
    Options of `convert_llava`: those given, and a preset's for all others.

    Args:
        name: A key of [`LLAVA_PRESETS`], or `None` for no preset.
        given: The options of `convert` that somebody has chosen.

    Raises:
        ValueError: without a language model, for options of MiniGPT-4, and for one of its presets.
    """
    if name is not None and name not in LLAVA_PRESETS:
        raise ValueError(f"the preset {name} is a MiniGPT-4; those of LLaVA are {', '.join(LLAVA_PRESETS)}")
    foreign = sorted({"qformer", "delta", "projector_hidden_act"} & given.keys())
    if foreign:
        named = " and ".join(f"--{key.replace('_', '-')}" for key in foreign)
        raise ValueError(f"{named} is for MiniGPT-4; leave it out for LLaVA")
    options = {**(asdict(LLAVA_PRESETS[name]) if name is not None else {}), **given}
    if options.get("language_model") is None:
        raise ValueError("give --language-model, or --preset, which names the released parts of a model")
    if "chat_template" in options:
        options["prompt_format"] = options.pop("chat_template")
    return options


def fill_in(name: str | None, given: dict[str, object]) -> dict[str, object]:
    """
    Options of `convert`: those given, and a preset's for all others.

    Args:
        name: A key of [`PRESETS`], or `None` for no preset.
        given: The options that somebody has chosen.

    Raises:
        ValueError: for a source that neither names, a delta for the preset's merged language model, and a preset's
            projector that is not here.
    """
    options = {**(asdict(PRESETS[name]) if name is not None else {}), **given}
    missing = [key for key in ("vision", "language_model") if options.get(key) is None]
    if missing:
        named = " and ".join(f"--{key.replace('_', '-')}" for key in missing)
        raise ValueError(f"give {named}, or --preset, which names the released parts of a model")
    if name is None:
        return options
    if "delta" in given and "language_model" not in given:
        raise ValueError(
            f"the preset {name} names a merged language model, {options['language_model']}; with --delta, name the "
            "LLaMA that the delta belongs to with --language-model"
        )
    projector = str(options["projector"])
    if "projector" not in given and projector in PROJECTORS and not Path(projector).is_file():
        raise ValueError(
            f"the preset {name} takes the authors' projector from the file {projector}, which is not in this folder; "
            f"download it from {PROJECTORS[projector]}, or name it with --projector (fresh for one to be trained)"
        )
    return options
