"""Composes LLaVA checkpoints from released parts, reads those of its authors, and writes their `mm_projector.bin`."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from transformers_minigpt4.modeling.config_checks_minigpt4 import check_sizes
from transformers_minigpt4.modeling.configuration_llava import LlavaLinearConfig
from transformers_minigpt4.modeling.modeling_llava import LlavaLinearForConditionalGeneration
from transformers_minigpt4.processing.processing_llava import LlavaPromptProcessor
from transformers_minigpt4.processing.prompt_formats_llava import PROMPT_FORMATS
from transformers_minigpt4.utils.checkpoint_files import loading_from, read_json_object
from transformers_minigpt4.utils.files import atomic_file

from . import key_maps
from .compose import add_image_token, check_complete, constant, mapped
from .convert import AUTO, DTYPES
from .output import check_output, output_folder, save_checkpoint, save_sources
from .sources import (
    FRESH,
    Source,
    SubModel,
    open_language_model,
    open_tokenizer,
    open_vision_tower,
    split_revision,
    vision_source_config,
)
from .weight_record import save_record
from .weights import Piece, describe_source, find_file, open_weights


# The authors' demo (`llava/serve`): temperature, top-p and new tokens.
_SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.2, "top_p": 0.7, "max_new_tokens": 512}
# What of the authors' config.json belongs to the language model.
_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "tie_word_embeddings", "attention_bias"),
)
_FEATURES = {"patch": "default", "cls_patch": "full"}


class _Parts(NamedTuple):
    """What a checkpoint is made of; `projector` is `None` if it is to be drawn."""

    tower: SubModel
    language: SubModel
    tokenizer: PreTrainedTokenizerBase
    projector: Source | None
    vision: str
    settings: dict[str, Any]  # of the authors' config.json; empty for parts that are released alone


def convert_llava(
    output: str | os.PathLike[str],
    *,
    language_model: str,
    vision: str | None = None,
    projector: str = FRESH,
    projector_layers: int = 1,
    prompt_format: str = "llava_v1",
    pad_images: bool | None = None,
    dtype: str = AUTO,
    seed: int = 0,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    show_progress: bool = False,
) -> Path:
    """
    Composes a LLaVA that `from_pretrained` loads, or imports one of the authors' (`model_type: llava_llama`).

    With one layer as the projector the result is a [`LlavaLinearForConditionalGeneration`], with two transformers'
    [`LlavaForConditionalGeneration`].

    Args:
        output: Folder to create. It appears under its name only when it is complete.
        language_model: A LLaMA such as Vicuna with its tokenizer, or a complete checkpoint of the authors'.
        vision: A CLIP tower. By default the one that a checkpoint of the authors' names.
        projector: `mm_projector.bin`, or `"fresh"`; not for a complete checkpoint, which has one.
        projector_layers: Of a fresh projector: 1 as in the article, or 2 with GELU between them as in version 1.5.
        prompt_format: One of `PROMPT_FORMATS`, with which the checkpoint is trained and asked.
        pad_images: Pad images to squares, as version 1.5 does. By default what the authors' config says, else no.
        dtype: `"auto"` stores each tensor as its source does; or `"bfloat16"`, `"float16"`, `"float32"`.
        seed: For a fresh projector.
        max_shard_size: Largest weights file.
        overwrite: Replace an existing folder.
        show_progress: Show a progress bar on stderr.

    Raises:
        OSError: for sources that are missing, truncated or damaged, and a full disk.
        ValueError: for sources that are not what they should be or do not match.
    """
    output = Path(output).resolve()
    if prompt_format not in PROMPT_FORMATS:
        raise ValueError(f"the prompt format is {prompt_format!r}; choose one of {', '.join(PROMPT_FORMATS)}")
    if projector_layers not in (1, 2):
        raise ValueError(f"projector_layers={projector_layers}; a projector of LLaVA has 1 layer, or 2")
    if dtype != AUTO and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose {AUTO}, {', '.join(DTYPES)}.")
    check_output(output, [vision, language_model, None if projector == FRESH else projector], overwrite)
    parts = _open_parts(language_model, vision, projector)
    pad = parts.settings.get("image_aspect_ratio") == "pad" if pad_images is None else pad_images
    processor = _processor(parts, prompt_format, pad, language_model)
    drawn = parts.projector.pieces if parts.projector is not None else _fresh(parts, projector_layers, seed)
    config = _config(parts, processor, linear=key_maps.PROJECTOR + "linear_2.weight" not in drawn)
    with torch.device("meta"):
        model: PreTrainedModel = (
            LlavaLinearForConditionalGeneration(config)
            if isinstance(config, LlavaLinearConfig)
            else LlavaForConditionalGeneration(config)
        )
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_SAMPLING,
    )
    pieces = {**parts.tower.pieces, **parts.language.pieces, **drawn}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[key_maps.HEAD]
    check_complete(pieces, shapes)
    pieces = {name: pieces[name] for name in shapes}
    dtypes = {name: piece.dtype if dtype == AUTO else DTYPES[dtype] for name, piece in pieces.items()}
    for each in (config, parts.language.config, parts.tower.config):
        each.dtype = dtypes[key_maps.EMBEDDING]
    sources = [parts.tower, parts.language, *([parts.projector] if parts.projector is not None else [])]
    fresh = projector == FRESH and parts.projector is None
    recorded = {"dtype": dtype, "projector": describe_source(projector), "seed": seed if fresh else None}
    with output_folder(output, overwrite) as folder:
        save_checkpoint(folder, model, processor, pieces, dtypes, max_shard_size, show_progress)
        save_sources(folder, sources, recorded)
        save_record(folder, ("projector",) if fresh else ())
    return output


def _open_parts(language_model: str, vision: str | None, projector: str) -> _Parts:
    settings = _authors_config(language_model)
    if settings:
        if projector != FRESH:
            raise ValueError(
                f"{language_model} is a complete LLaVA with a projector of its own; leave out --projector"
            )
        return _open_complete(language_model, vision, settings)
    if vision is None:
        raise ValueError("give --vision, a CLIP tower such as openai/clip-vit-large-patch14")
    language, tokenizer = open_language_model(language_model, None)
    tower = open_vision_tower(vision, vision_source_config(vision), {})
    return _Parts(tower, language, tokenizer, open_llava_projector(projector), vision, {})


def _authors_config(name: str) -> dict[str, Any]:
    """The config.json of a checkpoint of the authors'; empty for another model."""
    source, revision = split_revision(name)
    path = find_file(source, "config.json", revision) if not Path(source).is_file() else None
    content = read_json_object(path) if path is not None else {}
    is_theirs = content.get("model_type") in ("llava", "llava_llama") and "mm_vision_tower" in content
    return content if is_theirs else {}


def _open_complete(name: str, vision: str | None, settings: dict[str, Any]) -> _Parts:
    source, revision = split_revision(name)
    if settings.get("mm_projector_type", "linear") not in ("linear", "mlp2x_gelu"):
        raise ValueError(
            f"{name} has a projector of the type {settings['mm_projector_type']!r}; linear and mlp2x_gelu are known"
        )
    if settings.get("mm_vision_select_feature", "patch") not in _FEATURES:
        raise ValueError(f"{name} takes the features {settings['mm_vision_select_feature']!r}, not patch or cls_patch")
    if vision is None:
        beside = Path(source) / str(settings["mm_vision_tower"])
        vision = str(beside) if beside.is_dir() else str(settings["mm_vision_tower"])
    if not any(find_file(source, file, revision) for file in ("tokenizer.model", "tokenizer.json")):
        raise OSError(f"{name} has no tokenizer (tokenizer.model or tokenizer.json). Copy that of its language model.")
    values = {key: settings[key] for key in _TEXT_KEYS if key in settings}
    check_sizes("", values)
    weights = open_weights(source, revision, wanted=lambda key: key_maps.LLAVA_LLAMA.target(key) is not None)
    pieces = mapped(weights, key_maps.LLAVA_LLAMA)
    found = {
        prefix: {key: pieces.pop(key) for key in list(pieces) if key.startswith(prefix)}
        for prefix in (key_maps.TOWER, key_maps.PROJECTOR)
    }
    if not found[key_maps.PROJECTOR]:
        raise ValueError(f"{weights.label} contains no projector (model.mm_projector.*)")
    if key_maps.EMBEDDING not in pieces:
        raise ValueError(f"{weights.label} contains no input embeddings (model.embed_tokens.weight).")
    tower_config = vision_source_config(vision)
    if found[key_maps.TOWER]:
        config: Any = getattr(tower_config, "vision_config", None) or tower_config
        tower = SubModel(found[key_maps.TOWER], [], config=config)
    else:
        tower = open_vision_tower(vision, tower_config, {})
    language = SubModel(pieces, [("llava", weights, None)], config=LlamaConfig.from_dict(values))
    return _Parts(tower, language, open_tokenizer(name), Source(found[key_maps.PROJECTOR]), vision, settings)


def open_llava_projector(name: str) -> Source | None:
    """
    Opens `mm_projector.bin`; `None` for a fresh projector.

    Raises:
        OSError, ValueError: for a file that cannot be read, or has no projector of one or two layers.
    """
    if name == FRESH:
        return None
    if not Path(name).is_file():
        raise OSError(f"There is no file {name}. Name the authors' mm_projector.bin, or {FRESH}.")
    weights = open_weights(name)
    pieces = mapped(weights, key_maps.LLAVA_PROJECTOR)
    layers = {key.removeprefix(key_maps.PROJECTOR) for key in pieces}
    if layers not in _LAYERS:
        raise ValueError(f"{name} has {', '.join(sorted(weights.keys)) or 'no tensors'}: no projector of LLaVA")
    return Source(pieces, [("projector", weights, None)])


_LAYERS = (
    {"weight", "bias"},
    {f"linear_{layer}.{part}" for layer in (1, 2) for part in ("weight", "bias")},
)


def _fresh(parts: _Parts, layers: int, seed: int) -> dict[str, Piece]:
    """`nn.Linear` as torch draws it."""
    width, hidden = parts.tower.config.hidden_size, parts.language.config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        names = ("linear_1", "linear_2")[:layers]
        linear = nn.ModuleDict({name: nn.Linear((width, hidden)[place], hidden) for place, name in enumerate(names)})
    state = linear.state_dict() if layers == 2 else linear["linear_1"].state_dict()
    return {key_maps.PROJECTOR + name: constant(tensor) for name, tensor in state.items()}


def _processor(parts: _Parts, prompt_format: str, pad: bool, language_model: str) -> LlavaPromptProcessor:
    vision, revision = split_revision(parts.vision)
    size = parts.tower.config.image_size
    with loading_from(vision, weights=False):
        image_processor = LlavaImageProcessorPil.from_pretrained(
            vision,
            revision=revision or "main",
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            do_pad=pad,
        )
    source, revision = split_revision(language_model)
    path = find_file(source, "tokenizer_config.json", revision)
    tokenizer_config = read_json_object(path) if path is not None else {}
    return LlavaPromptProcessor(
        image_processor,
        parts.tokenizer,
        patch_size=parts.tower.config.patch_size,
        vision_feature_select_strategy=_FEATURES[parts.settings.get("mm_vision_select_feature", "patch")],
        prompt_format=prompt_format,
        # transformers 4 took a LLaMA tokenizer that does not say it for a legacy one, version 5 does not.
        legacy=bool(tokenizer_config.get("legacy", True)),
        image_start_end=bool(parts.settings.get("mm_use_im_start_end", False)),
    )


def _config(parts: _Parts, processor: LlavaPromptProcessor, linear: bool) -> LlavaConfig:
    """The model's config; the language model gets one more row if the image token has none."""
    text_config, tokenizer = parts.language.config, processor.tokenizer
    rows = parts.language.pieces[key_maps.EMBEDDING].shape[0]
    if len(tokenizer) > rows + 1:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens with the image token, but the language model {rows}: they do "
            "not belong together. Take both from one folder."
        )
    if processor.image_token_id >= rows:
        add_image_token(parts.language.pieces)
        rows += 1
    text_config.vocab_size = rows
    text_config.bos_token_id = tokenizer.bos_token_id
    text_config.eos_token_id = tokenizer.eos_token_id
    text_config.pad_token_id = tokenizer.pad_token_id
    configs: list[PreTrainedConfig] = [parts.tower.config, text_config]
    for config in configs:
        config.name_or_path = ""  # a path of this machine
        config.architectures = None
    config_class = LlavaLinearConfig if linear else LlavaConfig
    return config_class(
        vision_config=parts.tower.config,
        text_config=text_config,
        image_token_index=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        vision_feature_layer=parts.settings.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )


def export_projector(checkpoint: str, output: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """
    Writes the projector of a LLaVA as the authors' `mm_projector.bin`, which their scripts load.

    Args:
        checkpoint: Folder or Hub id of a LLaVA, of this package or of transformers.
        output: File to write.
        overwrite: Replace an existing file.

    Raises:
        FileExistsError: for a file that exists, unless `overwrite`.
        OSError, ValueError: for a checkpoint that cannot be read, or has no projector of LLaVA.
    """
    output = Path(output)
    if output.is_dir() or (output.exists() and not overwrite):
        advice = "Name a file." if output.is_dir() else "Name another file, or replace it with --overwrite."
        raise FileExistsError(f"{output} exists. {advice}")
    source, revision = split_revision(checkpoint)
    names = key_maps.OUR_LLAVA_PROJECTOR
    weights = open_weights(source, revision, wanted=lambda key: names.target(key) is not None)
    found = {target: weights.read(key) for key in weights.keys if (target := names.target(key)) is not None}
    if not found:
        raise ValueError(f"{checkpoint} has no projector of LLaVA (multi_modal_projector.*)")
    with atomic_file(output) as scratch:
        torch.save(found, scratch)
    return output


__all__ = ["convert_llava", "export_projector", "open_llava_projector"]
