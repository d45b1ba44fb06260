"""
The keys of recipes that `minigpt4 train --help` lists, in groups; imports neither TRL nor transformers.

A test compares names and defaults with `StageArguments`, `StageConfig` and TRL's `ModelConfig`.
"""

from typing import NamedTuple, get_args

from transformers_minigpt4.utils.command_line import DType, PromptFormat, Seed, TrustRemoteCode


# Short names of keys, on the command line only.
ALIASES = {
    "model": "model_name_or_path",
    "output": "output_dir",
    "batch_size": "per_device_train_batch_size",
}


class Key(NamedTuple):
    """A key of recipes: its name, or its alias, the placeholder of its value, its help and its default."""

    name: str
    metavar: str
    help: str
    default: object = None

    @property
    def option(self) -> str:
        """The key as an option of the command line."""
        return f"--{self.name.replace('_', '-')}"


def _shared(option: object) -> str:
    """The help of an option that other commands have too."""
    return str(get_args(option)[1].help)


KEYS: dict[str, tuple[Key, ...]] = {
    "Model and data": (
        Key("model", "CHECKPOINT", "Folder or Hub id of the model to start from, or python:MODULE:FUNCTION."),
        Key("model_revision", "REVISION", "Branch, tag or commit of a model on the Hub.", "main"),
        Key("trust_remote_code", "BOOL", _shared(TrustRemoteCode), False),
        Key("sources", "SOURCE...", "Sources of rows, KIND:PATH[::weight=NUMBER]; see docs/reference/formats.md.", []),
        Key("prompt_format", "FORMAT", _shared(PromptFormat), "stage2"),
        Key("max_row_length", "NUMBER", "Positions of a row, images included; longer ones are cut (LLaVA).", None),
        Key("max_completion_length", "NUMBER", "Maximum length of an answer, in tokens; longer ones are cut.", 160),
        Key("max_error_rate", "NUMBER", "Fraction of unusable rows above which the run stops.", 0.05),
        Key("feature_cache", "FOLDER", "Features from `minigpt4 features`; training then needs no vision tower."),
    ),
    "What is trained": (
        Key("trainable_modules", "NAME...", "projector, qformer, language_model, lora.", ["projector"]),
        Key(
            "use_peft", "BOOL", "Whether to train LoRA adapters; set it if lora is among the trainable modules.", False
        ),
        Key("lora_r", "NUMBER", "Rank of the adapters.", 16),
        Key("lora_alpha", "NUMBER", "Scale of the adapters.", 32),
        Key("lora_dropout", "NUMBER", "Dropout of the adapters.", 0.05),
        Key("lora_target_modules", "NAME...", "Layers of the language model that get adapters."),
        Key("load_in_4bit", "BOOL", "Quantize frozen weights to 4 bits.", False),
        Key("load_in_8bit", "BOOL", "Quantize frozen weights to 8 bits.", False),
        Key("bnb_4bit_quant_type", "TYPE", "nf4 or fp4.", "nf4"),
        Key("use_bnb_nested_quant", "BOOL", "Also quantize the quantization constants.", False),
    ),
    "Schedule": (
        Key("max_steps", "NUMBER", "Optimizer steps; required for sources whose number of rows is not known.", -1),
        Key("num_train_epochs", "NUMBER", "Times that all rows are seen, if --max-steps is not set.", 3.0),
        Key("batch_size", "NUMBER", "Inputs that go through the model at once on each device.", 8),
        Key("gradient_accumulation_steps", "NUMBER", "Batches per optimizer step.", 1),
        Key("learning_rate", "NUMBER", "Peak learning rate.", 2e-5),
        Key("lr_scheduler_type", "NAME", "One of transformers' schedules; ignored with --min-lr.", "linear"),
        Key("min_lr", "NUMBER", "Final learning rate; setting it selects the authors' schedule."),
        Key("warmup_steps", "NUMBER", "Steps of linear warmup.", 0),
        Key("warmup_start_lr", "NUMBER", "Learning rate of the first step, in the authors' schedule.", 1e-6),
        Key("iters_per_epoch", "NUMBER", "Steps of the first epoch, in the authors' schedule. By default the warmup."),
        Key("weight_decay", "NUMBER", "Weight decay.", 0.0),
        Key("adam_beta1", "NUMBER", "First beta of AdamW.", 0.9),
        Key("adam_beta2", "NUMBER", "Second beta of AdamW.", 0.999),
        Key("max_grad_norm", "NUMBER", "Norm to clip gradients to; 0 does not clip.", 0.0),
        Key("seed", "NUMBER", _shared(Seed), 42),
    ),
    "Speed and memory": (
        Key("dtype", "DTYPE", _shared(DType), "float32"),
        Key("bf16", "BOOL", "Mixed precision with bfloat16."),
        Key("activation_checkpointing", "BOOL", "Recompute activations instead of storing them."),
        Key("attn_implementation", "NAME", "Such as sdpa or flash_attention_2."),
        Key("pack_rows", "BOOL", "Pack the rows of a batch into sequences without padding.", False),
        Key("pack_tokens", "NUMBER", "Length of packed sequences, in tokens. By default a batch is one sequence."),
        Key("dataloader_num_workers", "NUMBER", "Worker processes that load data.", 0),
        Key("dataloader_pin_memory", "BOOL", "Load batches into pinned memory.", True),
        Key("use_cpu", "BOOL", "Train on the CPU even if there is a GPU.", False),
    ),
    "Saving and logging": (
        Key("output", "FOLDER", "Folder for checkpoints, run info and the final model."),
        Key(
            "resume_from_checkpoint",
            "BOOL|FOLDER",
            "true resumes from the last checkpoint in --output, a folder from that one.",
        ),
        Key("save_steps", "NUMBER", "Steps between checkpoints.", 500),
        Key("save_total_limit", "NUMBER", "Checkpoints to keep. By default all."),
        Key("logging_steps", "NUMBER", "Steps between log entries.", 10),
        Key("report_to", "NAME", "Trackers, such as tensorboard, trackio or wandb.", "none"),
    ),
    "Evaluation": (
        Key("eval_share", "FRACTION", "Fraction of the sources' images that is held out, to evaluate on."),
        Key("eval_sources", "SOURCE...", "Sources of rows to evaluate on, in place of a share.", []),
        Key("eval_rows", "NUMBER", "Rows of an evaluation, at most.", 256),
        Key("eval_steps", "NUMBER", "Steps between evaluations. By default those between checkpoints."),
        Key(
            "load_best_model_at_end", "BOOL", "Whether the result is the checkpoint with the lowest eval_loss.", False
        ),
        Key("sample_images", "FILE...", "Images described at each checkpoint. By default held-out ones.", []),
    ),
    "Checks before and during a run": (
        Key("check_first_loss", "BOOL", "Stop if the first loss is no better than chance.", True),
        Key("requires_stage1", "BOOL", "Refuse a model with an untrained projector.", False),
        Key("requires_qformer", "BOOL", "Refuse a model without a Q-Former; false refuses one with a Q-Former."),
        Key("requires_projector_layers", "NUMBER", "Refuse a model with a different number of projector layers."),
    ),
}
