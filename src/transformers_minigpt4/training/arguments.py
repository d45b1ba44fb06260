"""The keys of a recipe: TRL's and transformers' own, and the few that the stages add."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import SFTConfig

from transformers_minigpt4.data.prompt_formats import FORMS
from transformers_minigpt4.utils.file_names import SOURCES_FILE

from .stages import LORA, PARTS


PYTHON = "python:"  # in front of MODULE:FUNCTION, for rows or a model that code makes


@dataclass
class StageArguments:
    """
    What a recipe says beyond TRL's `ModelConfig` and `SFTConfig`.

    Args:
        trainable_modules (`list[str]`): Parts that learn, see `stages.prepare_stage`.
        sources (`list[str]`): Sources of rows as `KIND:PATH[::weight=NUMBER]…`, see `data.open_rows`; or one
            `python:MODULE:FUNCTION`, which is called with the number of rows and the seed and returns a `Dataset`.
        form (`str`): Form of the rows: `stage1`, `stage2`, `stage2_llama2`, `messages`.
        max_completion_length (`int`, *optional*): Tokens of an answer; the tail of longer ones is cut.
        max_error_rate (`float`): Share of bad rows above which the run stops.
        requires_stage1 (`bool`): Refuse a model whose projection has not been trained.
        requires_qformer (`bool`, *optional*): Whether the model must have a Q-Former, or must not.
        requires_projector_layers (`int`, *optional*): Linear layers that its projection must have.
        check_first_loss (`bool`): Stop when the first loss is that of guessing.
        feature_cache (`str`, *optional*): Folder of `minigpt4 features`, which makes it; pictures are then neither
            decoded nor encoded, and the vision tower is not loaded.
        pack_rows (`bool`): Put the rows of a batch one behind the other, without padding.
        pack_tokens (`int`, *optional*): Positions of a packed sequence; by default the whole batch is one.
    """

    trainable_modules: list[str] = field(default_factory=lambda: ["projector"], metadata={"help": "Parts that learn."})
    sources: list[str] = field(default_factory=list, metadata={"help": "Sources of rows, KIND:PATH[::weight=N]."})
    form: str = field(default="stage2", metadata={"help": "Form of the rows."})
    max_completion_length: int | None = field(default=160, metadata={"help": "Tokens of an answer."})
    max_error_rate: float = field(default=0.05, metadata={"help": "Share of bad rows above which the run stops."})
    requires_stage1: bool = field(default=False, metadata={"help": "Refuse a model with an untrained projection."})
    requires_qformer: bool | None = field(default=None, metadata={"help": "Whether the model has a Q-Former."})
    requires_projector_layers: int | None = field(default=None, metadata={"help": "Layers of its projection."})
    check_first_loss: bool = field(default=True, metadata={"help": "Stop when the first loss is that of guessing."})
    feature_cache: str | None = field(default=None, metadata={"help": "Folder of `minigpt4 features`."})
    pack_rows: bool = field(default=False, metadata={"help": "Pack the rows of a batch without padding."})
    pack_tokens: int | None = field(default=None, metadata={"help": "Positions of a packed sequence."})

    def __post_init__(self):
        # A YAML file may name one without a list.
        self.trainable_modules = (
            [self.trainable_modules] if isinstance(self.trainable_modules, str) else self.trainable_modules
        )
        self.sources = [self.sources] if isinstance(self.sources, str) else self.sources


@dataclass
class StageConfig(SFTConfig):
    """
    TRL's `SFTConfig` with the authors' schedule, and with defaults that this model needs.

    Args:
        min_lr (`float`, *optional*): Floor of the authors' schedule; set, it takes the place of `lr_scheduler_type`.
        warmup_start_lr (`float`): Rate of that schedule's first step.
        iters_per_epoch (`int`, *optional*): Steps of the authors' first epoch; by default `warmup_steps`.
    """

    min_lr: float | None = field(default=None, metadata={"help": "Floor of the authors' schedule."})
    warmup_start_lr: float = field(default=1e-6, metadata={"help": "Rate of that schedule's first step."})
    iters_per_epoch: int | None = field(default=None, metadata={"help": "Steps of that schedule's first epoch."})
    # TRL's own truncation could cut image tokens; answers are cut by `max_completion_length`.
    max_length: int | None = field(default=None, metadata={"help": "Must stay unset."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows go to the collator whole."})
    logging_first_step: bool = field(default=True, metadata={"help": "The guards look at the first loss."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "NaN must be seen, not averaged away."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "The authors do not clip gradients."})
    seed: int = field(default=42, metadata={"help": "As in the paper's code."})


def check_arguments(stage: StageArguments, config: Any, model_args: Any) -> None:
    """
    Refuses options that cannot work together, before anything is loaded.

    Raises:
        ValueError: naming the options and what to change.
    """
    unknown = sorted(set(stage.trainable_modules) - set(PARTS) - {LORA})
    if unknown or not stage.trainable_modules:
        raise ValueError(
            f"trainable_modules has {', '.join(unknown) or 'nothing'}; name one or more of "
            f"{', '.join([*PARTS, LORA])}."
        )
    if stage.form not in FORMS:
        raise ValueError(f"form: {stage.form} is unknown; choose one of {', '.join(FORMS)}.")
    if not stage.sources:
        raise ValueError(
            "The recipe names no data. Set sources, for example --sources cc_sbu_align:/data/cc_sbu_align."
        )
    called = [source for source in stage.sources if source.startswith(PYTHON)]
    if called and len(stage.sources) > 1:
        raise ValueError(f"{called[0]} cannot be mixed with other sources. Name it alone.")
    if not model_args.model_name_or_path:
        raise ValueError("The recipe names no model. Set model_name_or_path to a folder or Hub id.")
    if config.max_length is not None:
        raise ValueError(
            f"max_length={config.max_length} would cut image tokens. Leave it unset; answers have "
            "max_completion_length."
        )
    if config.packing or config.padding_free:
        raise ValueError(
            "TRL refuses packing and padding_free for pictures. Switch both off; pack_rows: true packs rows here."
        )
    if model_args.use_peft != (LORA in stage.trainable_modules):
        raise ValueError(
            f"use_peft={model_args.use_peft} and trainable_modules={stage.trainable_modules} contradict each other: "
            f"adapters train with `{LORA}` among the parts and use_peft: true, or not at all."
        )
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    if quantized and "language_model" in stage.trainable_modules:
        raise ValueError(
            "load_in_4bit or load_in_8bit and trainable_modules: language_model exclude each other, because quantised "
            "weights cannot learn. Train lora in its place."
        )
    if config.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end needs whole checkpoints, and these hold trained parts. Switch it off."
        )
    _check_optimizations(stage, config)
    if config.push_to_hub:
        raise ValueError(
            "push_to_hub would upload the output folder as it stands, paths of this computer included. Leave it off, "
            "and publish the finished run with `minigpt4 push OUTPUT_DIR NAMESPACE/NAME`, which checks what goes."
        )
    if config.max_steps <= 0:
        raise ValueError("A stream of rows has no end, so the run needs one: set max_steps.")
    if config.min_lr is not None and config.min_lr > config.learning_rate:
        raise ValueError(f"The floor min_lr={config.min_lr} is above learning_rate={config.learning_rate}. Lower it.")


def _check_optimizations(stage: StageArguments, config: Any) -> None:
    if stage.pack_tokens is not None and (not stage.pack_rows or stage.pack_tokens < 1):
        raise ValueError(
            f"pack_tokens={stage.pack_tokens} with pack_rows={stage.pack_rows}: it bounds packed sequences, and is 1 "
            "or more. Set pack_rows: true, or leave it out."
        )
    if stage.pack_rows and config.n_gpu > 1:
        raise ValueError(
            f"pack_rows with {config.n_gpu} GPUs in one process: torch would cut packed batches by rows. Start one "
            "process per GPU with `accelerate launch`, or show it one GPU with CUDA_VISIBLE_DEVICES."
        )
    if stage.feature_cache is None:
        return
    if "qformer" in stage.trainable_modules:
        raise ValueError(
            "feature_cache and trainable_modules: qformer exclude each other: features change with every step of the "
            "Q-Former and cannot be kept. Leave feature_cache out."
        )
    sharded = {name for name in ("fsdp", "deepspeed") if getattr(config, name) or _launched(name)}
    if sharded:
        raise ValueError(
            f"feature_cache with {sharded.pop()}: a model without its tower has not been tried sharded over "
            "processes. Leave feature_cache out, or launch with ddp.yaml: without the tower more fits one GPU."
        )


def _launched(name: str) -> bool:
    """Whether `accelerate launch` chose FSDP or DeepSpeed."""
    return os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("true", "1")


def check_model(stage: StageArguments, config: Any, name: str) -> None:
    """
    Refuses a model that the recipe was not written for, from its config alone.

    Raises:
        ValueError: for a variant that differs, or a projection not yet trained where the stage builds on one.
    """
    model_type = getattr(config, "model_type", None)
    if model_type == "blip-2" and (stage.feature_cache or stage.pack_rows):
        raise ValueError(
            f"{name} is a BLIP-2, an encoder-decoder here, which takes neither cached features nor packed rows. Leave "
            "out feature_cache and pack_rows."
        )
    if stage.requires_qformer is not None:
        has = getattr(config, "qformer_config", None) is not None
        if has != stage.requires_qformer:
            raise ValueError(
                f"The recipe is for a model {'with' if stage.requires_qformer else 'without'} Q-Former, and {name} is "
                f"one {'with' if has else 'without'}. Take the base that the recipe's header names."
            )
    layers = getattr(config, "projector_layers", None)
    if stage.requires_projector_layers is not None and layers != stage.requires_projector_layers:
        raise ValueError(
            f"The recipe is for a projection of {stage.requires_projector_layers} linear layers, and {name} has "
            f"{layers}. Take the base that the recipe's header names."
        )
    if stage.requires_stage1 and model_type == "minigpt4":
        trained = getattr(config, "trained_parameters", None) or []
        if not any("multi_modal_projector" in parameter for parameter in trained) and not _converted(name):
            raise ValueError(
                f"{name} is no checkpoint of stage 1: it has no record of a trained projection. Train stage 1 first "
                "and set model_name_or_path to its output; where the projection was trained in another way, set "
                "requires_stage1: false."
            )


def _converted(folder: str) -> bool:
    """Whether `minigpt4 convert` took a trained projection into this checkpoint, by the note that it leaves."""
    path = Path(folder) / SOURCES_FILE
    if not path.is_file():
        return False
    projector = json.loads(path.read_text(encoding="utf-8")).get("settings", {}).get("projector")
    return projector not in (None, "fresh")
