"""Composes a MiniGPT-4 checkpoint from released weights: vision tower, Q-Former, language model, projector."""

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    Blip2VisionConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from transformers_minigpt4.modeling.configuration_minigpt4 import PATCHES_PER_TOKEN, MiniGPT4Config
from transformers_minigpt4.modeling.modeling_minigpt4 import (
    MiniGPT4ForConditionalGeneration,
    MiniGPT4MultiModalProjector,
)
from transformers_minigpt4.processing.chat_templates_minigpt4 import CHAT_TEMPLATES
from transformers_minigpt4.processing.processing_minigpt4 import MiniGPT4Processor

from . import key_maps
from .compose import add_image_token, check_complete, check_projector, constant
from .output import check_output, output_folder, save_checkpoint, save_sources
from .sources import (
    FRESH,
    NONE,
    ConfigValues,
    Source,
    SubModel,
    is_blip2,
    open_image_processor,
    open_language_model,
    open_projector,
    open_qformer,
    open_vision_tower,
    split_revision,
    vision_source_config,
)
from .weight_record import save_record
from .weights import Piece, describe_source, find_file


AUTO = "auto"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_VICUNA_V0_CONTEXT = 2048  # positions; LLaMA-2 has 4096


def convert_checkpoint(
    output: str | os.PathLike[str],
    *,
    vision: str,
    language_model: str,
    qformer: str | None = None,
    projector: str = FRESH,
    delta: str | None = None,
    chat_template: str | None = None,
    dtype: str = AUTO,
    projector_layers: int = 1,
    projector_hidden_act: str | None = None,
    seed: int = 0,
    vision_config: ConfigValues | None = None,
    qformer_config: ConfigValues | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    show_progress: bool = False,
) -> Path:
    """
    Composes a checkpoint that `from_pretrained` loads. Tensors stream through memory one at a time.

    Sources are paths, or Hub ids with an optional `@revision`.

    Args:
        output: Folder to create. It appears under its name only when it is complete.
        vision: A BLIP-2 in transformers format (`Salesforce/blip2-flan-t5-xxl`), `eva_vit_g.pth`, or, with a fresh
            projector, any tower of one image size in transformers format (SigLIP, DINOv3, CLIP), alone or in a
            two-tower model.
        language_model: A decoder-only language model with its tokenizer; with `delta`, the LLaMA that it belongs to.
        qformer: A BLIP-2 in transformers format, `blip2_pretrained_flant5xxl.pth`, `"fresh"` or `"none"`. By default
            that of a BLIP-2 given as `vision`, unless the projector was trained without; otherwise none.
        projector: An authors' checkpoint, or `"fresh"` for one to be trained.
        delta: A Vicuna delta. Its tokenizer and config are used.
        chat_template: `"vicuna_v0"`, `"llama_2"` or a Jinja template. By default the tokenizer's own, and Vicuna v0
            if it has none. With an authors' projector: what the language model was trained with.
        dtype: `"auto"` stores each tensor as its source does; `"bfloat16"`, `"float16"` or `"float32"`. The projector
            is always fp32, and with fp16 so are Q-Former, queries and last LayerNorm, because the model loads them so.
        projector_layers: 1 or 3; 3 only for a fresh projector.
        projector_hidden_act: Activation between 3 layers.
        seed: For the weights that are drawn at random.
        vision_config: Values that replace those found. `eva_vit_g.pth` of another size than ViT-g needs
            `num_attention_heads`, which cannot be read from a tensor.
        qformer_config: The same for the Q-Former.
        max_shard_size: Largest weights file.
        overwrite: Replace an existing folder.
        show_progress: Show a progress bar on stderr.

    Returns:
        `Path`: `output`.

    Raises:
        OSError: for sources that are missing, truncated or damaged, and a full disk.
        ValueError: for sources that are not what they should be or do not match, with the names of the tensors.
    """
    output = Path(output).resolve()
    _check_choices(dtype, qformer, projector, projector_layers, chat_template)
    check_output(output, [vision, language_model, qformer, projector, delta], overwrite)

    source_config = vision_source_config(vision)
    trained = _open_trained(projector, vision, source_config)
    tower = open_vision_tower(vision, source_config, vision_config or {})
    language, tokenizer = open_language_model(language_model, delta)
    bridge, queries = _open_bridge(vision, source_config, tower, qformer, trained, qformer_config or {}, seed)
    if trained is not None:
        _check_neighbors(trained, tower, bridge, language.config, tokenizer, language_model)
        chat_template = chat_template or _authors_template(language.config, tokenizer, language_model)

    processor = MiniGPT4Processor(open_image_processor(vision, tower.config), tokenizer, chat_template=chat_template)
    config = _build_config(tower, bridge, queries, language, processor, projector_layers, projector_hidden_act)
    processor.image_seq_length = config.image_seq_length
    if trained is not None:
        config.trained_parameters = sorted(trained.pieces)
    with torch.device("meta"):
        model = MiniGPT4ForConditionalGeneration(config)
    model.generation_config = _generation_config(processor, language_model, delta)
    pieces = _collect(model, tower, bridge, language, trained, seed)
    dtypes = _choose_dtypes(model, pieces, dtype)
    settings = {
        "dtype": dtype,
        "projector": describe_source(projector),
        "seed": seed if FRESH in (projector, qformer) else None,
    }

    sources = [source for source in (tower, bridge, language, trained) if source is not None]
    with output_folder(output, overwrite) as folder:
        save_checkpoint(folder, model, processor, pieces, dtypes, max_shard_size, show_progress)
        save_sources(folder, sources, settings)
        chosen = {"projector": projector, "Q-Former": qformer, "queries": qformer}
        save_record(folder, [part for part, source in chosen.items() if source == FRESH])
    return output


def _check_choices(
    dtype: str, qformer: str | None, projector: str, projector_layers: int, chat_template: str | None
) -> None:
    if dtype != AUTO and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose {AUTO}, {', '.join(DTYPES)}.")
    if projector != FRESH and projector_layers != 1:
        raise ValueError(
            f"projector_layers={projector_layers} needs a fresh projector: the authors' checkpoints have one layer."
        )
    if projector != FRESH and qformer == FRESH:
        raise ValueError(
            "The authors' projector works with BLIP-2's Q-Former or without one, not with a fresh one. Use "
            f"--projector {FRESH} too, or name a Q-Former."
        )
    if chat_template is not None and chat_template not in CHAT_TEMPLATES and "{" not in chat_template:
        raise ValueError(
            f"chat_template {chat_template!r} is neither {' nor '.join(CHAT_TEMPLATES)}, nor a Jinja template."
        )


def _open_bridge(
    vision: str,
    source_config: PreTrainedConfig | None,
    tower: SubModel,
    qformer: str | None,
    trained: Source | None,
    changes: ConfigValues,
    seed: int,
) -> tuple[SubModel | None, int]:
    """The Q-Former, or `None` if there is none, and the number of its queries."""
    if qformer is None:
        weight = trained.pieces.get(key_maps.PROJECTOR + "linear_1.weight") if trained is not None else None
        without = weight is not None and weight.shape[1] == PATCHES_PER_TOKEN * tower.config.hidden_size
        qformer = vision if is_blip2(source_config) and not without else NONE
    if qformer == NONE:
        return None, MiniGPT4Config.num_query_tokens
    return open_qformer(qformer, tower.config.hidden_size, changes, seed)


def _open_trained(projector: str, vision: str, source_config: PreTrainedConfig | None) -> Source | None:
    """The authors' checkpoint, or `None` for a fresh projector."""
    if projector == FRESH:
        return None
    if source_config is not None and not is_blip2(source_config):
        raise ValueError(
            f"The authors' projector was trained on BLIP-2's ViT-g, but {vision} is a {source_config.model_type!r} "
            f"model. Name a BLIP-2 or eva_vit_g.pth, or use --projector {FRESH}."
        )
    return open_projector(projector)


def _check_neighbors(
    trained: Source,
    tower: SubModel,
    bridge: SubModel | None,
    language_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    language_model: str,
) -> None:
    """Refuses what the authors' projector was not trained with; Qwen3-8B and LLaMA-3-8B are as wide as Vicuna-7B."""
    kind = language_config.model_type
    if kind != "llama" or tokenizer.convert_tokens_to_ids("▁") in (None, tokenizer.unk_token_id):
        raise ValueError(
            f"The authors' projector was trained with Vicuna v0 or LLaMA-2-chat, but {language_model} is a {kind!r} "
            f"model{' with another tokenizer' if kind == 'llama' else ''}. Use the language model that it was trained "
            f"with, or --projector {FRESH}, and train it."
        )
    in_features = bridge.config.hidden_size if bridge is not None else PATCHES_PER_TOKEN * tower.config.hidden_size
    ((_, weights, _),) = trained.origins
    check_projector(
        trained.pieces, weights.label, in_features, describe_source(language_model), language_config.hidden_size
    )


def _authors_template(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if tokenizer.chat_template is None and (config.max_position_embeddings or 0) <= _VICUNA_V0_CONTEXT:
        return "vicuna_v0"
    raise ValueError(
        f"{name} does not look like Vicuna v0 (it has a chat template, or more than {_VICUNA_V0_CONTEXT} positions). "
        "Choose the prompts that the projector was trained with: --chat-template llama_2 for LLaMA-2-chat, vicuna_v0 "
        "for Vicuna."
    )


def _build_config(
    tower: SubModel,
    bridge: SubModel | None,
    queries: int,
    language: SubModel,
    processor: MiniGPT4Processor,
    projector_layers: int,
    projector_hidden_act: str | None,
) -> MiniGPT4Config:
    """The model's config; the language model gets one more row if the image token has none."""
    text_config, tokenizer = language.config, processor.tokenizer
    rows = language.pieces[key_maps.EMBEDDING].shape[0]
    if len(tokenizer) > rows + 1:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens with the image token, but the language model {rows}: they do "
            "not belong together. Take both from one folder."
        )
    if processor.image_token_id >= rows:
        add_image_token(language.pieces)
        rows += 1
    text_config.vocab_size = rows
    # Configs of Vicuna v0 say bos 0, eos 1 and pad -1, which is wrong (Vision-CAIR/MiniGPT-4#339).
    text_config.bos_token_id = tokenizer.bos_token_id
    text_config.eos_token_id = tokenizer.eos_token_id
    text_config.pad_token_id = tokenizer.pad_token_id
    vision_config = _without_origin(tower.config)
    qformer_config = _without_origin(bridge.config) if bridge is not None else None
    text_config = _without_origin(text_config)
    return MiniGPT4Config(
        vision_config=vision_config,
        qformer_config=qformer_config,
        text_config=text_config,
        num_query_tokens=queries,
        projector_layers=projector_layers,
        projector_hidden_act=projector_hidden_act,
        image_token_id=processor.image_token_id,
    )


def _without_origin(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.name_or_path = ""  # a path of this machine
    config.architectures = None
    return config


def _plain_layernorm(width: int) -> dict[str, Piece]:
    """Without Q-Former nothing loads the authors' `ln_vision`: it stays at weight 1 and bias 0 (golden/README.md)."""
    return {
        key_maps.POST_LAYERNORM + "weight": constant(torch.ones(width)),
        key_maps.POST_LAYERNORM + "bias": constant(torch.zeros(width)),
    }


def _fresh_projector(config: MiniGPT4Config, seed: int) -> dict[str, Piece]:
    """`nn.Linear` as torch draws it, like the authors' `llama_proj`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = MiniGPT4MultiModalProjector(config)
    return {key_maps.PROJECTOR + name: constant(tensor) for name, tensor in projector.state_dict().items()}


def _saved_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Names and shapes that `save_pretrained` would write, without tied tensors, in the model's order."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state[key_maps.HEAD]
    # Experts are fused in memory, and saved one by one.
    return {name: tensor.shape for name, tensor in revert_weight_conversion(model, state).items()}


def _collect(
    model: MiniGPT4ForConditionalGeneration,
    tower: SubModel,
    bridge: SubModel | None,
    language: SubModel,
    trained: Source | None,
    seed: int,
) -> dict[str, Piece]:
    """All tensors of the model, in its order; those of the authors' checkpoint take precedence over others."""
    pieces = {**tower.pieces, **language.pieces}
    if bridge is not None:
        pieces.update(bridge.pieces)
    if isinstance(tower.config, Blip2VisionConfig) and key_maps.POST_LAYERNORM + "weight" not in pieces:
        pieces.update(_plain_layernorm(tower.config.hidden_size))
    pieces.update(trained.pieces if trained is not None else _fresh_projector(model.config, seed))
    shapes = _saved_shapes(model)
    check_complete(pieces, shapes)
    return {name: pieces[name] for name in shapes}


def _choose_dtypes(model: PreTrainedModel, pieces: Mapping[str, Piece], dtype: str) -> dict[str, torch.dtype]:
    """
    The dtype of each tensor, and that of the model, which is set in its configs.

    With a dtype chosen, each is stored as `from_pretrained` would hold it, so that saving a loaded model gives the
    same bits again. With `"auto"` the model's dtype is that of the language model.
    """
    main = DTYPES[dtype] if dtype != AUTO else pieces[key_maps.EMBEDDING].dtype
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        if config is not None:
            config.dtype = main
    kept = _kept_in_fp32(model, main)
    chosen = {}
    for name, piece in pieces.items():
        in_fp32 = name.startswith(key_maps.PROJECTOR) or any(pattern.search(name) for pattern in kept)
        if not piece.dtype.is_floating_point:
            chosen[name] = piece.dtype
        elif in_fp32:
            chosen[name] = torch.float32
        else:
            chosen[name] = main if dtype != AUTO else piece.dtype
    return chosen


def _kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> list[re.Pattern[str]]:
    """Patterns for the names of the parameters that `from_pretrained` loads in fp32 although `dtype` is chosen."""
    names = set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(model._keep_in_fp32_modules_strict or ())
    return [re.compile(name.replace("*", ".*")) for name in sorted(names)]


def _generation_config(processor: MiniGPT4Processor, language_model: str, delta: str | None) -> GenerationConfig:
    """The authors' defaults; a language model that keeps its chat template keeps its end-of-turn tokens too."""
    generation_config = processor.get_generation_config()
    if processor.chat_template in CHAT_TEMPLATES.values():
        return generation_config
    source, revision = split_revision(delta or language_model)
    path = find_file(source, "generation_config.json", revision)
    if path is None:
        return generation_config
    own = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    own = [own] if isinstance(own, int) else own or []
    generation_config.eos_token_id = list(dict.fromkeys([*generation_config.eos_token_id, *own]))
    return generation_config


__all__ = ["convert_checkpoint"]
