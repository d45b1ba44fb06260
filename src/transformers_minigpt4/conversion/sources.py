"""Opens what a checkpoint is composed of: vision tower, Q-Former, language model with tokenizer, projector."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub import metadata_load
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor

from transformers_minigpt4.modeling.config_checks_minigpt4 import check_sizes, config_file, sizes_of
from transformers_minigpt4.utils.checkpoint_files import loading_from, read_json_object
from transformers_minigpt4.utils.families import BLIP2, family_of

from . import key_maps
from .compose import add_delta, constant, mapped
from .key_maps import KeyMap, shorten
from .weights import Piece, Weights, find_file, naming, open_weights


FRESH, NONE = "fresh", "none"
ConfigValues: TypeAlias = Mapping[str, Any]  # of a config class, by field
# Head counts are in no tensor. These go with the widths of ViT-g and of BERT-base.
_VIT_G_WIDTH, _VIT_G_HEADS, _VIT_G_BLOCKS = 1408, 16, 39
_BERT_WIDTH, _BERT_HEADS = 768, 12


@dataclass
class Source:
    """Tensors by their names in the checkpoint, and where they came from."""

    pieces: dict[str, Piece]
    origins: list[tuple[str, Weights, str | None]] = field(default_factory=list)  # role, weights, license


@dataclass
class SubModel(Source):
    """A vision tower, Q-Former or language model: its tensors with its config."""

    config: PreTrainedConfig = field(kw_only=True)


def split_revision(name: str) -> tuple[str, str | None]:
    """`namespace/name@revision` as a pair; a path is not split."""
    if Path(name).exists() or "@" not in name:
        return name, None
    source, _, revision = name.rpartition("@")
    return source, revision


def _open(name: str, key_map: KeyMap) -> Weights:
    source, revision = split_revision(name)
    return open_weights(source, revision, wanted=lambda key: key_map.target(key) is not None)


def _license(name: str) -> str | None:
    """The license in the README of a folder or repository, if it names one."""
    source, revision = split_revision(name)
    readme = None if Path(source).is_file() else find_file(source, "README.md", revision)
    license_id = (metadata_load(readme) or {}).get("license") if readme is not None else None
    return license_id if isinstance(license_id, str) else None


def _config(name: str) -> PreTrainedConfig:
    source, revision = split_revision(name)
    if not Path(source).exists() and (source.startswith(("/", ".", "~")) or Path(source).suffix in (".pth", ".pt")):
        raise OSError(f"There is no file or folder {source}.")
    path = Path(source) / "config.json"
    if path.is_file():
        content = read_json_object(path)
        try:
            check_sizes("", content)  # before the config's own class fails on them
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    with naming(source), loading_from(source, weights=False):
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    try:
        check_sizes("", sizes_of(config))
        for key in config.sub_configs:
            if (sub_config := getattr(config, key, None)) is not None:
                check_sizes(key, sizes_of(sub_config))
    except ValueError as error:
        raise ValueError(f"{config_file(source)}: {error}") from error
    return config


def is_blip2(config: PreTrainedConfig | None) -> bool:
    return family_of(config) is BLIP2


def vision_source_config(name: str) -> PreTrainedConfig | None:
    """Config of a vision source in transformers format; `None` for a file, which is EVA-CLIP's."""
    return None if Path(name).is_file() else _config(name)


def open_vision_tower(name: str, source_config: PreTrainedConfig | None, changes: ConfigValues) -> SubModel:
    """
    Opens a vision tower, without the `ln_vision` that BLIP-2 trained with its Q-Former.

    Args:
        name: `eva_vit_g.pth`, or folder or Hub id of a BLIP-2, of a tower, or of a model with a vision tower.
        source_config: What `vision_source_config` gave.
        changes: Values of the tower's config that replace those found.

    Raises:
        OSError, ValueError: for a source that cannot be read or contains no vision tower.
    """
    if source_config is None:
        weights = _open(name, key_maps.EVA_VIT)
        eva_config = _eva_config(weights, changes)
        # The file has one block more than the authors' code uses.
        blocks = range(eva_config.num_hidden_layers, _count(weights.keys, r"blocks\.(\d+)\..*"))
        key_map = KeyMap(
            key_maps.EVA_VIT.name,
            key_maps.EVA_VIT.used,
            (*key_maps.EVA_VIT.ignored, *(f"blocks.{block}.{{rest}}" for block in blocks)),
        )
        return SubModel(mapped(weights, key_map), [("vision_tower", weights, None)], config=eva_config)

    config = getattr(source_config, "vision_config", None) or source_config
    if not hasattr(config, "patch_size") or getattr(config, "image_size", None) is None:
        raise ValueError(
            f"{name} is a {source_config.model_type!r} model without a vision tower that takes images of one size. "
            "Name a BLIP-2 such as Salesforce/blip2-flan-t5-xxl, eva_vit_g.pth, or a tower such as SigLIP-2."
        )
    for key, value in changes.items():
        setattr(config, key, value)
    if is_blip2(source_config):
        key_map = key_maps.BLIP2_TOWER
    else:
        key_map = key_maps.TWO_TOWERS if _has_prefix(name, "vision_model.") else key_maps.TOWER_ALONE
    weights = _open(name, key_map)
    pieces = mapped(weights, key_map)
    if not pieces:
        raise ValueError(f"{weights.label} contains no tensors of a vision tower, although its config has one.")
    return SubModel(pieces, [("vision_tower", weights, _license(name))], config=config)


def _has_prefix(name: str, prefix: str) -> bool:
    source, revision = split_revision(name)
    # No shard is opened for this where there is an index.
    return any(key.startswith(prefix) for key in open_weights(source, revision, wanted=lambda key: False).keys)


def _count(keys: list[str], pattern: str) -> int:
    """One more than the largest number that `pattern` finds in `keys`."""
    return 1 + max((int(match[1]) for key in keys if (match := re.fullmatch(pattern, key))), default=-1)


def _eva_config(weights: Weights, changes: ConfigValues) -> Blip2VisionConfig:
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    missing = [key for key in needed if key not in weights.entries]
    if missing:
        raise ValueError(
            f"{weights.label} has no {shorten(missing)}: it is not EVA-CLIP's eva_vit_g.pth. Other towers are read "
            "from folders or Hub ids in transformers format."
        )
    shapes = {key: weights.entries[key].shape for key in needed}
    width, patch = shapes["cls_token"][-1], shapes["patch_embed.proj.weight"][-1]
    blocks = _count(weights.keys, r"blocks\.(\d+)\..*")
    depth = blocks - 1
    if width == _VIT_G_WIDTH:
        depth = _VIT_G_BLOCKS  # whether or not the fortieth was cut off
    elif "num_attention_heads" not in changes:
        raise ValueError(
            f"{weights.label} is {width} wide, not {_VIT_G_WIDTH} like ViT-g, and no tensor shows the number "
            "of attention heads. Pass vision_config={'num_attention_heads': …}."
        )
    values = {
        "hidden_size": width,
        "intermediate_size": shapes["blocks.0.mlp.fc1.weight"][0],
        "num_hidden_layers": depth,
        "num_attention_heads": _VIT_G_HEADS,
        "image_size": patch * round((shapes["pos_embed"][1] - 1) ** 0.5),
        "patch_size": patch,
    }
    config = Blip2VisionConfig(**{**values, **changes})
    if config.num_hidden_layers > blocks:
        raise ValueError(f"{weights.label} contains {blocks} blocks, but {config.num_hidden_layers} are needed.")
    return config


def open_image_processor(name: str, vision_config: PreTrainedConfig) -> BaseImageProcessor:
    """
    The image processor of a tower: resizing to the square it takes, without crop, as the authors do.

    Mean, deviation and interpolation are CLIP's for BLIP-2's tower, and the tower's own for others.
    """
    size = vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = {"height": height, "width": width}
    if isinstance(vision_config, Blip2VisionConfig):
        return BlipImageProcessorPil(size=shape)
    source, revision = split_revision(name)
    with loading_from(source, weights=False):
        image_processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=False,
            size=shape,
            crop_size=None,
            do_resize=True,
            do_center_crop=False,
        )
    return image_processor


def open_qformer(name: str, encoder_width: int, changes: ConfigValues, seed: int) -> tuple[SubModel, int]:
    """
    Opens a Q-Former with its queries and `ln_vision`.

    Args:
        name: `blip2_pretrained_flant5xxl.pth`, folder or Hub id of a BLIP-2 in transformers format, or `"fresh"`.
        encoder_width: Hidden size of the vision tower.
        changes: Values of the Q-Former's config that replace those found.
        seed: For a fresh one.

    Returns:
        `tuple[SubModel, int]`: The Q-Former, and the number of its queries.
    """
    if name == FRESH:
        return _fresh_qformer(encoder_width, changes, seed)
    if Path(name).is_file():
        weights = _open(name, key_maps.LAVIS_QFORMER)
        config = _lavis_qformer_config(weights, changes)
        pieces = mapped(weights, key_maps.LAVIS_QFORMER)
    else:
        source_config = _config(name)
        if not is_blip2(source_config):
            raise ValueError(
                f"{name} is a {source_config.model_type!r} model and has no Q-Former of BLIP-2. Name a BLIP-2 such as "
                "Salesforce/blip2-flan-t5-xxl, or blip2_pretrained_flant5xxl.pth."
            )
        config = source_config.qformer_config
        for key, value in changes.items():
            setattr(config, key, value)
        weights = _open(name, key_maps.BLIP2_QFORMER)
        pieces = mapped(weights, key_maps.BLIP2_QFORMER)
    if key_maps.QUERIES not in pieces:
        raise ValueError(f"{weights.label} contains no query_tokens, and so no Q-Former of BLIP-2.")
    source = SubModel(pieces, [("qformer", weights, _license(name))], config=config)
    return source, pieces[key_maps.QUERIES].shape[1]


def _lavis_qformer_config(weights: Weights, changes: ConfigValues) -> Blip2QFormerConfig:
    layer = "Qformer.bert.encoder.layer."
    needed = ("query_tokens", layer + "0.intermediate_query.dense.weight", layer + "0.crossattention.self.key.weight")
    missing = [key for key in needed if key not in weights.entries]
    if missing:
        raise ValueError(
            f"{weights.label} has no {shorten(missing)}: it is not BLIP-2's blip2_pretrained_flant5xxl.pth."
        )
    width = weights.entries["query_tokens"].shape[-1]
    if width != _BERT_WIDTH and "num_attention_heads" not in changes:
        raise ValueError(
            f"{weights.label} is {width} wide, not {_BERT_WIDTH} like BLIP-2's Q-Former, and no tensor shows the "
            "number of attention heads. Pass qformer_config={'num_attention_heads': …}."
        )
    layers = _count(weights.keys, re.escape(layer) + r"(\d+)\..*")
    crossed = sorted(n for n in range(layers) if f"{layer}{n}.crossattention.self.key.weight" in weights.entries)
    values = {
        "hidden_size": width,
        "intermediate_size": weights.entries[needed[1]].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": _BERT_HEADS,
        "encoder_hidden_size": weights.entries[needed[2]].shape[1],
        "cross_attention_frequency": crossed[1] if len(crossed) > 1 else layers,
    }
    return Blip2QFormerConfig(**{**values, **changes})


def _fresh_qformer(encoder_width: int, changes: ConfigValues, seed: int) -> tuple[SubModel, int]:
    config = Blip2QFormerConfig(**{"encoder_hidden_size": encoder_width, **changes})
    queries = 32  # BLIP-2's
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Blip2QFormerModel(config)
        tokens = torch.empty(1, queries, config.hidden_size).normal_(0, config.initializer_range)
    pieces = {key_maps.QFORMER + name: constant(tensor) for name, tensor in model.state_dict().items()}
    return SubModel({**pieces, key_maps.QUERIES: constant(tokens)}, config=config), queries


def open_language_model(name: str, delta: str | None) -> tuple[SubModel, PreTrainedTokenizerBase]:
    """
    Opens a language model and its tokenizer.

    Args:
        name: Folder or Hub id in transformers format; the base, if there is a delta.
        delta: Folder or Hub id of a Vicuna delta.

    Returns:
        `tuple[SubModel, PreTrainedTokenizerBase]`: Config and tokenizer are the delta's, if there is one.
    """
    if delta is None and "-delta-v" in Path(split_revision(name)[0]).name:
        raise ValueError(
            f"{name} is a delta by its name, which is not a language model until its base is added. Name the LLaMA "
            "that it belongs to as language model and this as delta."
        )
    config = _config(delta or name)
    if config.is_encoder_decoder or not hasattr(config, "vocab_size"):
        raise ValueError(
            f"{name} is a {config.model_type!r} model, not a decoder-only language model. Name one such as Vicuna or "
            "Qwen3."
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{name} is quantized. Take the unquantized weights; quantize when loading instead.")
    key_map = key_maps.TIED_LANGUAGE_MODEL if config.tie_word_embeddings else key_maps.LANGUAGE_MODEL
    weights = _open(name, key_map)
    source = SubModel(mapped(weights, key_map), [("language_model", weights, _license(name))], config=config)
    if delta is not None:
        change = _open(delta, key_map)
        source.pieces = add_delta(source.pieces, mapped(change, key_map), (weights.label, change.label))
        source.origins.append(("language_model_delta", change, _license(delta)))
    if key_maps.EMBEDDING not in source.pieces:
        raise ValueError(f"{weights.label} contains no input embeddings (model.embed_tokens.weight).")
    return source, open_tokenizer(delta or name)


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a folder or Hub id.

    The first conversions of LLaMA, and the Vicunas made of them, have special tokens that are empty, or `</s>` for
    all, or name a class that no longer exists. transformers then fails or tokenizes in another way. LLaMA's own
    special tokens replace them.
    """
    source, revision = split_revision(name)
    with loading_from(source, weights=False):
        if find_file(source, "tokenizer.model", revision) is None or not _is_broken(source, revision):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source, revision=revision, trust_remote_code=False
            )
            return tokenizer
        repaired: PreTrainedTokenizerBase = LlamaTokenizer.from_pretrained(
            source, revision=revision or "main", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        return repaired


def _is_broken(source: str, revision: str | None) -> bool:
    settings: dict[str, object] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := find_file(source, file, revision)) is not None:
            settings.update(json.loads(path.read_text(encoding="utf-8")))
    bos, eos = (
        token["content"] if isinstance(token, dict) else token
        for token in (settings.get("bos_token"), settings.get("eos_token"))
    )
    return settings.get("tokenizer_class") == "LLaMATokenizer" or "" in (bos, eos) or (bos == eos == "</s>")


def open_projector(name: str) -> Source:
    """
    Opens an authors' checkpoint: the projector, and the Q-Former if that was trained (variant (c)).

    Raises:
        OSError, ValueError: for a file that cannot be read or is not one of theirs.
    """
    if not Path(name).is_file():
        raise OSError(
            f"There is no file {name}. Name an authors' checkpoint, such as pretrained_minigpt4_7b.pth, or {FRESH}."
        )
    weights = _open(name, key_maps.AUTHORS_PROJECTOR)
    return Source(mapped(weights, key_maps.AUTHORS_PROJECTOR), [("projector", weights, None)])
