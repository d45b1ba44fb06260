"""Makes a MiniGPT-4 checkpoint of released parts: vision tower, Q-Former, language model, projector."""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Blip2VisionConfig, GenerationConfig
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import PreTrainedModel

from transformers_minigpt4.modeling.configuration_minigpt4 import PATCHES_PER_TOKEN, MiniGPT4Config
from transformers_minigpt4.modeling.modeling_minigpt4 import (
    MiniGPT4ForConditionalGeneration,
    MiniGPT4MultiModalProjector,
)
from transformers_minigpt4.processing.chat_templates_minigpt4 import CHAT_TEMPLATES
from transformers_minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from transformers_minigpt4.utils.file_names import SOURCES_FILE

from . import key_maps
from .compose import add_image_token, check_complete, check_projector, constant
from .sources import (
    FRESH,
    NONE,
    Part,
    is_blip2,
    open_image_processor,
    open_language_model,
    open_projector,
    open_qformer,
    open_vision_tower,
    split_revision,
    vision_source_config,
)
from .weights import Piece, describe_source, find_file, flush, save_pieces


AUTO = "auto"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_VICUNA_V0_CONTEXT = 2048  # positions; LLaMA-2 has 4096


def convert_checkpoint(
    output: str | os.PathLike,
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
    vision_config: Mapping[str, Any] | None = None,
    qformer_config: Mapping[str, Any] | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    show_progress: bool = False,
) -> Path:
    """
    Composes a checkpoint that `from_pretrained` loads. Tensors stream through memory one at a time.

    Sources are paths, or Hub ids with an optional `@revision`.

    Args:
        output: Folder to make. It appears under its name only when it is complete.
        vision: A BLIP-2 in transformers format (`Salesforce/blip2-flan-t5-xxl`), `eva_vit_g.pth`, or, with a fresh
            projector, any tower of one image size in transformers format (SigLIP, DINOv3, CLIP), also as a part of a
            two-tower model.
        language_model: A decoder-only language model with its tokenizer; with `delta`, the LLaMA that it belongs to.
        qformer: A BLIP-2 in transformers format, `blip2_pretrained_flant5xxl.pth`, `"fresh"` or `"none"`. By default
            that of a BLIP-2 named as `vision`, unless the projector was trained without; else none.
        projector: An authors' checkpoint, or `"fresh"` for one to be trained.
        delta: A Vicuna delta. Its tokenizer and config are taken.
        chat_template: `"vicuna_v0"`, `"llama_2"` or a Jinja template. By default the tokenizer's own, and Vicuna v0
            where it has none. With an authors' projector: what the language model was trained with.
        dtype: `"auto"` stores each tensor as its source does; `"bfloat16"`, `"float16"` or `"float32"`. The projector
            is always fp32, and with fp16 so are Q-Former, queries and last LayerNorm, because the model loads them so.
        projector_layers: 1 or 3, of a fresh projector.
        projector_hidden_act: Activation between 3 layers.
        seed: Draws what is fresh.
        vision_config: Values in place of those found. `eva_vit_g.pth` of another size than ViT-g needs
            `num_attention_heads`, which no tensor tells.
        qformer_config: The same for the Q-Former.
        max_shard_size: Largest weights file.
        overwrite: Replace an existing folder.
        show_progress: Show a progress bar on stderr.

    Returns:
        `Path`: `output`.

    Raises:
        OSError: for sources that are missing, truncated or damaged, and a disk without room.
        ValueError: for sources that are not what they should be or do not fit together, with the names of the tensors.
    """
    output = Path(output).resolve()
    _check_choices(dtype, qformer, projector, projector_layers, chat_template)
    _check_output(output, [vision, language_model, qformer, projector, delta], overwrite)

    source_config = vision_source_config(vision)
    trained = _open_trained(projector, vision, source_config)
    tower = open_vision_tower(vision, source_config, vision_config or {})
    language, tokenizer = open_language_model(language_model, delta)
    bridge, queries = _open_bridge(vision, source_config, tower, qformer, trained, qformer_config or {}, seed)
    if trained is not None:
        _check_neighbours(trained, tower, bridge, language.config, tokenizer, language_model)
        chat_template = chat_template or _authors_template(language.config, tokenizer, language_model)

    processor = MiniGPT4Processor(open_image_processor(vision, tower.config), tokenizer, chat_template=chat_template)
    config = _build_config(tower, bridge, queries, language, processor, projector_layers, projector_hidden_act)
    processor.image_seq_length = config.image_seq_length
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

    with appearing(output, overwrite) as folder:
        _check_room(folder, sum(dtypes[name].itemsize * _numel(piece) for name, piece in pieces.items()))
        _save_weights(folder, pieces, dtypes, max_shard_size, show_progress)
        _save_rest(folder, model, processor)
        _save_sources(folder, [part for part in (tower, bridge, language, trained) if part is not None], settings)
    return output


def _check_choices(
    dtype: str, qformer: str | None, projector: str, projector_layers: int, chat_template: str | None
) -> None:
    if dtype != AUTO and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose {AUTO}, {', '.join(DTYPES)}.")
    if projector != FRESH and projector_layers != 1:
        raise ValueError(
            f"projector_layers={projector_layers} goes with a fresh projector: the authors' checkpoints have one "
            "layer."
        )
    if projector != FRESH and qformer == FRESH:
        raise ValueError(
            "The authors' projector goes with BLIP-2's Q-Former or with none, not with a fresh one. Take "
            f"--projector {FRESH} too, or name a Q-Former."
        )
    if chat_template is not None and chat_template not in CHAT_TEMPLATES and "{" not in chat_template:
        raise ValueError(
            f"chat_template {chat_template!r} is neither {' nor '.join(CHAT_TEMPLATES)}, nor a Jinja template."
        )


def _check_output(output: Path, sources: list[str | None], overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file. Name a new folder.")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(f"{output} exists and is not empty. Name a new folder, or overwrite it (--overwrite).")
    for source in filter(None, sources):
        if output.exists() and Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"{source} is, or lies in, the output folder {output}, which would be replaced. Name another."
            )


def _open_bridge(
    vision: str,
    source_config: Any,
    tower: Part,
    qformer: str | None,
    trained: Part | None,
    changes: Mapping[str, Any],
    seed: int,
) -> tuple[Part | None, int]:
    """The Q-Former and the number of its queries, or `None` where there is none."""
    if qformer is None:
        weight = trained.pieces.get(key_maps.PROJECTOR + "linear_1.weight") if trained is not None else None
        without = weight is not None and weight.shape[1] == PATCHES_PER_TOKEN * tower.config.hidden_size
        qformer = vision if is_blip2(source_config) and not without else NONE
    if qformer == NONE:
        return None, MiniGPT4Config.num_query_tokens
    return open_qformer(qformer, tower.config.hidden_size, changes, seed)


def _open_trained(projector: str, vision: str, source_config: Any) -> Part | None:
    """The authors' checkpoint, or `None` for a fresh projector."""
    if projector == FRESH:
        return None
    if source_config is not None and not is_blip2(source_config):
        raise ValueError(
            f"The authors' projector was trained on BLIP-2's ViT-g, but {vision} is a {source_config.model_type!r} "
            f"model. Name a BLIP-2 or eva_vit_g.pth, or take --projector {FRESH}."
        )
    return open_projector(projector)


def _check_neighbours(
    trained: Part, tower: Part, bridge: Part | None, language_config: Any, tokenizer: Any, language_model: str
) -> None:
    """Widths alone do not tell a LLaMA: Qwen3-8B and LLaMA-3-8B are as wide as Vicuna-7B."""
    kind = language_config.model_type
    if kind != "llama" or tokenizer.convert_tokens_to_ids("▁") in (None, tokenizer.unk_token_id):
        raise ValueError(
            f"The authors' projector speaks to Vicuna v0 or LLaMA-2-chat, but {language_model} is a {kind!r} model"
            f"{' with another tokenizer' if kind == 'llama' else ''}. Take the language model that it was trained "
            f"with, or --projector {FRESH}, and train it."
        )
    in_features = bridge.config.hidden_size if bridge is not None else PATCHES_PER_TOKEN * tower.config.hidden_size
    ((_, weights, _),) = trained.sources
    check_projector(
        trained.pieces, weights.label, in_features, describe_source(language_model), language_config.hidden_size
    )


def _authors_template(config: Any, tokenizer: Any, name: str) -> str:
    if tokenizer.chat_template is None and (config.max_position_embeddings or 0) <= _VICUNA_V0_CONTEXT:
        return "vicuna_v0"
    raise ValueError(
        f"{name} does not look like Vicuna v0 (it has a chat template, or more than {_VICUNA_V0_CONTEXT} positions). "
        "Say which prompts the projector was trained with: --chat-template llama_2 for LLaMA-2-chat, vicuna_v0 for "
        "Vicuna."
    )


def _build_config(
    tower: Part,
    bridge: Part | None,
    queries: int,
    language: Part,
    processor: MiniGPT4Processor,
    projector_layers: int,
    projector_hidden_act: str | None,
) -> MiniGPT4Config:
    """The model's config; the language model gains a row where the image token has none."""
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
    parts = [copy.deepcopy(part) for part in (tower.config, bridge.config if bridge else None, text_config)]
    for part in filter(None, parts):
        part._name_or_path = ""  # a path of this machine
        part.architectures = None
    vision_config, qformer_config, text_config = parts
    return MiniGPT4Config(
        vision_config=vision_config,
        qformer_config=qformer_config,
        text_config=text_config,
        num_query_tokens=queries,
        projector_layers=projector_layers,
        projector_hidden_act=projector_hidden_act,
        image_token_id=processor.image_token_id,
    )


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
    return {name: tensor.shape for name, tensor in revert_weight_conversion(model, state).items()}


def _collect(
    model: PreTrainedModel, tower: Part, bridge: Part | None, language: Part, trained: Part | None, seed: int
) -> dict[str, Piece]:
    """All tensors of the model, in its order; those of the authors' checkpoint stand before others."""
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
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs_defaults)):
        if config is not None:
            config.dtype = main
    plan = model._get_dtype_plan(main)
    kept = build_glob_alternation(list(plan))[0] if plan else None
    chosen = {}
    for name, piece in pieces.items():
        in_fp32 = name.startswith(key_maps.PROJECTOR) or (kept is not None and kept.search(name) is not None)
        if not piece.dtype.is_floating_point:
            chosen[name] = piece.dtype
        elif in_fp32:
            chosen[name] = torch.float32
        else:
            chosen[name] = main if dtype != AUTO else piece.dtype
    return chosen


def _generation_config(processor: MiniGPT4Processor, language_model: str, delta: str | None) -> GenerationConfig:
    """The authors' defaults; a language model that keeps its own chat template keeps the ends of its turns too."""
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


def _numel(piece: Piece) -> int:
    return torch.Size(piece.shape).numel()


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"The checkpoint takes {size / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free. Make room, "
            "or name a folder on another disk."
        )


def _save_weights(
    folder: Path,
    pieces: Mapping[str, Piece],
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: str | int,
    show_progress: bool,
) -> None:
    size = sum(dtypes[name].itemsize * _numel(piece) for name, piece in pieces.items())
    # disable=None: no bar where stderr is a file.
    with tqdm(total=size, unit="B", unit_scale=True, disable=None if show_progress else True) as bar:
        save_pieces(folder, pieces, dtypes, max_shard_size, bar.update)


def _save_rest(folder: Path, model: PreTrainedModel, processor: MiniGPT4Processor) -> None:
    """Configs, processor and remote code: what `save_pretrained` of model and processor would write."""
    config = model.config
    config.dtype = str(config.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if model._auto_class is not None:
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.tokenizer.name_or_path = ""
    processor.save_pretrained(folder)


def _save_sources(folder: Path, parts: list[Part], settings: Mapping[str, Any]) -> None:
    """Where each part came from. `sha256` is that of the tensors read, see `Weights.digest`."""
    rows = []
    for part in parts:
        for role, weights, licence in part.sources:
            row = {"part": role, "id": weights.label, "revision": weights.revision, "sha256": weights.digest()}
            rows.append({**row, "license": licence})
    record = {"sources": rows, "settings": {key: value for key, value in settings.items() if value is not None}}
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (folder / SOURCES_FILE).write_text(text, encoding="utf-8")


@contextmanager
def appearing(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end, or vanishes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.parent / f".{output.name}.{os.getpid()}.partial"
    old = output.parent / f".{output.name}.{os.getpid()}.old"
    scratch.mkdir()
    try:
        yield scratch
        for path in (*scratch.iterdir(), scratch):
            flush(path)
        if output.exists() and overwrite and any(output.iterdir()):
            output.rename(old)
        try:
            scratch.rename(output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise
        flush(output.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, f"writing {output} failed ({error.strerror}); nothing of it is left") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


__all__ = ["appearing", "convert_checkpoint"]
