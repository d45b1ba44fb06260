"""The keys of a recipe: TRL's and transformers' own, and the few that the stages add."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedConfig
from trl import ModelConfig, SFTConfig

from transformers_minigpt4.data.held_out import Selection
from transformers_minigpt4.data.prompt_formats import PROMPT_FORMATS, PromptFormat
from transformers_minigpt4.utils.families import FAMILIES, LORA, PROJECTOR, QFORMER, family_of
from transformers_minigpt4.utils.file_names import SOURCES_FILE

from .cpu_settings import fit_trainer, has_accelerator
from .packing import check_packable
from .reporters import check_reporters
from .schedule import check_floor
from .stages import check_modules


_NEEDS_ROWS = "needs rows to evaluate on. Set eval_share, such as 0.02, or eval_sources."
PYTHON = "python:"  # in front of MODULE:FUNCTION, for rows or a model that code makes


@dataclass
class StageArguments:
    """
    The keys of a recipe beyond TRL's `ModelConfig` and `SFTConfig`.

    Args:
        trainable_modules (`list[str]`): Modules to train, see `stages.prepare_stage`.
        sources (`list[str]`): Sources of rows as `KIND:PATH[::weight=NUMBER]…`, see `data.open_rows`; or one
            `python:MODULE:FUNCTION`, which is called with the number of rows and the seed and returns a `Dataset`.
        prompt_format (`str`): Prompt format of the rows: one of `data.prompt_formats.PROMPT_FORMATS`.
        max_completion_length (`int`, *optional*): Tokens of an answer; longer ones are cut at the end.
        max_row_length (`int`, *optional*): Positions of a row, images included, after which it is cut; for LLaVA.
        max_error_rate (`float`): Fraction of bad rows above which the run stops.
        requires_stage1 (`bool`): Refuse a model whose projector has not been trained.
        requires_qformer (`bool`, *optional*): Whether the model must have a Q-Former, or must not.
        requires_projector_layers (`int`, *optional*): Linear layers that its projector must have.
        check_first_loss (`bool`): Stop when the first loss is that of guessing.
        feature_cache (`str`, *optional*): Folder built by `minigpt4 features`; images are then neither decoded nor
            encoded, and the vision tower is not loaded.
        pack_rows (`bool`): Pack the rows of a batch into sequences without padding.
        pack_tokens (`int`, *optional*): Positions of a packed sequence; by default the batch is one sequence.
    """

    trainable_modules: list[str] = field(default_factory=lambda: [PROJECTOR], metadata={"help": "Modules to train."})
    sources: list[str] = field(default_factory=list, metadata={"help": "Sources of rows, KIND:PATH[::weight=N]."})
    prompt_format: PromptFormat = field(default="stage2", metadata={"help": "Prompt format of the rows."})
    max_completion_length: int | None = field(default=160, metadata={"help": "Tokens of an answer."})
    max_row_length: int | None = field(default=None, metadata={"help": "Positions of a row, images included."})
    max_error_rate: float = field(default=0.05, metadata={"help": "Fraction of bad rows above which the run stops."})
    requires_stage1: bool = field(default=False, metadata={"help": "Refuse a model with an untrained projector."})
    requires_qformer: bool | None = field(default=None, metadata={"help": "Whether the model has a Q-Former."})
    requires_projector_layers: int | None = field(default=None, metadata={"help": "Layers of its projector."})
    check_first_loss: bool = field(default=True, metadata={"help": "Stop when the first loss is that of guessing."})
    feature_cache: str | None = field(default=None, metadata={"help": "Folder built by `minigpt4 features`."})
    pack_rows: bool = field(default=False, metadata={"help": "Pack the rows of a batch without padding."})
    pack_tokens: int | None = field(default=None, metadata={"help": "Positions of a packed sequence."})

    def __post_init__(self) -> None:
        # A YAML file may give one value without a list.
        if isinstance(self.trainable_modules, str):
            self.trainable_modules = [self.trainable_modules]
        if isinstance(self.sources, str):
            self.sources = [self.sources]


@dataclass
class StageConfig(SFTConfig):
    """
    TRL's `SFTConfig` with the authors' schedule, and with defaults that this model needs.

    Args:
        min_lr (`float`, *optional*): Floor of the authors' schedule; if set, it replaces `lr_scheduler_type`.
        warmup_start_lr (`float`): Learning rate of that schedule's first step.
        iters_per_epoch (`int`, *optional*): Steps of the authors' first epoch; by default `warmup_steps`.
        eval_sources (`list[str]`): Sources of rows to evaluate on, as in `sources`.
        eval_share (`float`, *optional*): In their place, the fraction of the images in `sources` that is held out.
        eval_rows (`int`): Rows of an evaluation, at most.
        sample_images (`list[str]`): Image files about which the model writes at each checkpoint; by default the images
            of the first rows of the evaluation.
        activation_checkpointing (`bool`, *optional*): What transformers before 5.23 only knows by its former name,
            `gradient_checkpointing`; recipes work with either.

    Where there is no GPU, `use_cpu` is set (`without_gpu` says so), and `changes` lists what else this changed.

    Raises:
        ValueError: for options of `SFTConfig` that cannot work here.
    """

    min_lr: float | None = field(default=None, metadata={"help": "Floor of the authors' schedule."})
    warmup_start_lr: float = field(default=1e-6, metadata={"help": "Learning rate of that schedule's first step."})
    iters_per_epoch: int | None = field(default=None, metadata={"help": "Steps of that schedule's first epoch."})
    eval_sources: list[str] = field(default_factory=list, metadata={"help": "Sources of rows to evaluate on."})
    eval_share: float | None = field(default=None, metadata={"help": "Fraction of the images that is held out."})
    eval_rows: int = field(default=256, metadata={"help": "Rows of an evaluation, at most."})
    sample_images: list[str] = field(default_factory=list, metadata={"help": "Images described at each checkpoint."})
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations.", "nargs": "?", "const": True}
    )
    # TRL's own truncation could cut image tokens; answers are cut by `max_completion_length`.
    max_length: int | None = field(default=None, metadata={"help": "Must stay unset."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator gets complete rows."})
    logging_first_step: bool = field(default=True, metadata={"help": "The sanity checks look at the first loss."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "NaN must be seen, not averaged away."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "The authors do not clip gradients."})
    seed: int = field(default=42, metadata={"help": "As in the paper's code."})

    def __post_init__(self) -> None:
        # transformers hides bars where libraries are quiet, as they are in `minigpt4`.
        self.disable_tqdm = bool(self.disable_tqdm)
        if self.activation_checkpointing is not None:
            self.gradient_checkpointing = self.activation_checkpointing
        self.without_gpu = not self.use_cpu and not has_accelerator()
        self.changes = fit_trainer(self, self.without_gpu)
        set_up_evaluation(self)
        super().__post_init__()
        if self.max_length is not None:
            raise ValueError(
                f"max_length={self.max_length} would cut image tokens. Leave it unset; answers have "
                "max_completion_length."
            )
        # The collator learns answers only in any case; TRL would ask for a template that it knows by heart.
        self.assistant_only_loss = False
        if self.packing or self.padding_free:
            raise ValueError(
                "TRL refuses packing and padding_free for images. Switch both off; pack_rows: true packs rows here."
            )
        if self.push_to_hub:
            raise ValueError(
                "push_to_hub would upload the output folder as it is, including paths of this computer. Leave it off, "
                "and publish the finished run with `minigpt4 push OUTPUT_DIR NAMESPACE/NAME`, which checks what is "
                "uploaded."
            )
        if self.min_lr is not None:
            check_floor(self.min_lr, self.learning_rate)


def set_up_evaluation(config: StageConfig) -> None:
    """
    Evaluates at each checkpoint unless the recipe says when, and compares checkpoints by their `eval_loss`.

    Raises:
        ValueError: for values that cannot work.
    """
    # A YAML file may give one value without a list.
    for name in ("eval_sources", "sample_images"):
        if isinstance(getattr(config, name), str):
            setattr(config, name, [getattr(config, name)])
    if config.eval_sources and config.eval_share is not None:
        raise ValueError(
            f"eval_share={config.eval_share} and eval_sources exclude each other: rows of the evaluation are held out "
            "of the sources of training, or come from others. Drop one of the two."
        )
    if config.eval_share is not None:
        try:
            Selection(config.eval_share, held_out=True)
        except ValueError as error:
            raise ValueError(f"eval_share: {error}") from error
    if config.eval_rows < 1:
        raise ValueError(f"eval_rows={config.eval_rows} leaves nothing to evaluate on. Take 1 or more.")
    if not evaluates(config):
        if config.load_best_model_at_end and config.eval_strategy == "no":
            raise ValueError(f"load_best_model_at_end {_NEEDS_ROWS}")
        return
    if config.eval_strategy == "no":
        config.eval_strategy = "epoch" if config.save_strategy == "epoch" else "steps"
        config.eval_steps = config.save_steps if config.eval_steps is None else config.eval_steps
    # With one checkpoint to keep, transformers would delete the last one, with which a run can be resumed.
    if config.metric_for_best_model is None and (config.load_best_model_at_end or config.save_total_limit != 1):
        config.metric_for_best_model = "loss"


def evaluates(config: StageConfig) -> bool:
    """Whether a recipe names rows to evaluate on."""
    return config.eval_share is not None or bool(config.eval_sources)


def check_stream(config: StageConfig) -> None:
    """
    Raises:
        ValueError: for options that cannot work with a stream of rows.
    """
    _check_batch_size(config)
    if config.max_steps <= 0:
        raise ValueError("A stream of rows has no end, so the run needs one: set max_steps.")


def _check_batch_size(config: StageConfig) -> None:
    if config.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size would change the batch size, on which the position in a stream depends. Switch it "
            "off, and set per_device_train_batch_size."
        )


def steps_of_epochs(config: StageConfig, sources: list[str], rows: int | None) -> int:
    """
    Optimizer steps of `num_train_epochs`, rounded up.

    Args:
        config (`StageConfig`): Has epochs, batch size, accumulation and number of processes.
        sources (`list[str]`): For the message.
        rows (`int`, *optional*): Rows of an epoch of all sources.

    Raises:
        ValueError: for sources of unknown length, and for no epochs.
    """
    if rows is None:
        raise ValueError(
            f"num_train_epochs={config.num_train_epochs:g} needs sources whose number of rows is known, and that of "
            f"{', '.join(sources)} is not known before all of them are read. Set max_steps instead."
        )
    if config.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs={config.num_train_epochs:g} trains nothing. Set it or max_steps above 0.")
    batch = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    return math.ceil(config.num_train_epochs * rows / batch)


def check_arguments(stage: StageArguments, config: StageConfig, model_args: ModelConfig) -> None:
    """
    Refuses options that cannot work together, before anything is loaded.

    Raises:
        ValueError: naming the options and what to change.
    """
    check_modules(stage.trainable_modules, quantized=model_args.load_in_4bit or model_args.load_in_8bit)
    if stage.prompt_format not in PROMPT_FORMATS:
        raise ValueError(
            f"prompt_format: {stage.prompt_format} is unknown; choose one of {', '.join(PROMPT_FORMATS)}."
        )
    if not stage.sources:
        raise ValueError(
            "The recipe names no data. Set sources, for example --sources cc_sbu_align:/data/cc_sbu_align."
        )
    called = [source for source in stage.sources if source.startswith(PYTHON)]
    if called and len(stage.sources) > 1:
        raise ValueError(f"{called[0]} cannot be mixed with other sources. Name it alone.")
    if not model_args.model_name_or_path:
        raise ValueError("The recipe names no model. Set model_name_or_path to a folder or Hub id.")
    if model_args.use_peft != (LORA in stage.trainable_modules):
        raise ValueError(
            f"use_peft={model_args.use_peft} and trainable_modules={stage.trainable_modules} contradict each other: "
            f"adapters train with `{LORA}` in trainable_modules and use_peft: true, or not at all."
        )
    if not called:
        _check_batch_size(config)
    uncounted = [source for source in stage.sources if source.startswith((PYTHON, "wds:"))]
    if config.max_steps <= 0 and uncounted:
        steps_of_epochs(config, uncounted, None)
    if config.eval_strategy != "no" and not evaluates(config):
        raise ValueError(f"eval_strategy={config.eval_strategy} {_NEEDS_ROWS}")
    check_reporters(config.report_to)
    _check_optimizations(stage, config)


def _check_optimizations(stage: StageArguments, config: StageConfig) -> None:
    if stage.pack_tokens is not None and (not stage.pack_rows or stage.pack_tokens < 1):
        raise ValueError(
            f"pack_tokens={stage.pack_tokens} with pack_rows={stage.pack_rows}: it bounds packed sequences, and must "
            "be 1 or more. Set pack_rows: true, or leave it out."
        )
    if stage.pack_rows and config.n_gpu > 1:
        raise ValueError(
            f"pack_rows with {config.n_gpu} GPUs in one process: torch would split packed batches by rows. Start "
            "one process per GPU with `accelerate launch`, or limit it to one GPU with CUDA_VISIBLE_DEVICES."
        )
    if stage.feature_cache is None:
        return
    if QFORMER in stage.trainable_modules:
        raise ValueError(
            "feature_cache and trainable_modules: qformer exclude each other: features change with every step of the "
            "Q-Former and cannot be cached. Leave feature_cache out."
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


def check_model(stage: StageArguments, config: PreTrainedConfig, name: str) -> None:
    """
    Refuses a model that the recipe was not written for, from its config.

    Raises:
        ValueError: for another variant, and for an untrained projector if the stage builds on a trained one.
    """
    family = family_of(config)
    if stage.pack_rows:
        check_packable(config)
    if stage.feature_cache is not None and not family.image_modules:
        cached = " and ".join(dict.fromkeys(known.name for known in FAMILIES.values() if known.image_modules))
        raise ValueError(
            f"{name} is a {config.model_type} model, and only features of {cached} can be cached. Leave out "
            "feature_cache."
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
            f"The recipe is for a projector of {stage.requires_projector_layers} linear layers, and {name} has "
            f"{layers}. Take the base that the recipe's header names."
        )
    if stage.requires_stage1 and family.records_stages:
        trained = getattr(config, "trained_parameters", None) or []
        if not any("multi_modal_projector" in parameter for parameter in trained) and not _converted(name):
            raise ValueError(
                f"{name} is not a checkpoint of stage 1: it has no record of a trained projector. Train stage 1 first "
                "and set model_name_or_path to its output; if the projector was trained in another way, set "
                "requires_stage1: false."
            )


def _converted(folder: str) -> bool:
    """Whether `minigpt4 convert` put a trained projector into this checkpoint, by its file of sources."""
    path = Path(folder) / SOURCES_FILE
    if not path.is_file():
        return False
    settings = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
    return settings.get("projector", settings.get("projection")) not in (None, "fresh")  # its name before 0.1.0
