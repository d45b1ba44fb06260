"""Fits a recipe that was made for GPUs to a machine without one, and says what it changed."""

import torch
from transformers.utils import is_torch_xla_available
from trl import ModelConfig, SFTConfig


def has_accelerator() -> bool:
    """Whether there is a GPU, or another device that torch prefers to the CPU."""
    return torch.accelerator.is_available() or is_torch_xla_available()


def fit_trainer(config: SFTConfig, without_gpu: bool) -> list[str]:
    """
    Changes what cannot work on a CPU, in place; call it before the config is validated.

    Args:
        config (`SFTConfig`): With `use_cpu: true` it was made for the CPU, and keeps bf16.
        without_gpu (`bool`): Whether it was made for a GPU that is not there. bf16 is then switched off as well: every
            CPU computes in fp32, and few have instructions for bf16.

    Returns:
        `list[str]`: What was changed, as `key → value`.
    """
    changes = []
    if without_gpu:
        changes += ["bf16 → fp32"] if config.bf16 else []
        config.use_cpu, config.bf16 = True, False
    if not config.use_cpu:
        return []
    if config.fp16:
        changes.append("fp16 → fp32")
        config.fp16 = False
        config.bf16 = bool(config.bf16)
    for key in ("bf16_full_eval", "fp16_full_eval", "tf32", "use_liger_kernel"):
        if getattr(config, key):
            changes.append(f"{key} → off")
            setattr(config, key, None if key == "tf32" else False)
    optimizer = str(getattr(config.optim, "value", config.optim))
    if "8bit" in optimizer or "paged" in optimizer or "bnb" in optimizer:
        changes.append(f"optim {optimizer} → adamw_torch")
        config.optim = "adamw_torch"
    return changes


def fit_model(model_args: ModelConfig, without_gpu: bool) -> list[str]:
    """
    Changes what cannot work on a CPU, in place, and 16-bit and quantized weights if the CPU stands in for a GPU.

    Returns:
        `list[str]`: What was changed, as `key → value`.
    """
    changes = []
    if "flash" in (model_args.attn_implementation or ""):
        changes.append(f"attn_implementation {model_args.attn_implementation} → sdpa")
        model_args.attn_implementation = "sdpa"
    if not without_gpu:
        return changes
    if model_args.dtype in ("bfloat16", "float16"):
        changes.append(f"dtype {model_args.dtype} → float32")
        model_args.dtype = "float32"
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, key):
            changes.append(f"{key} → off")
            setattr(model_args, key, False)
    return changes


def changes_line(changes: list[str], without_gpu: bool) -> str:
    """What was changed, in one line."""
    return f"{'No GPU' if without_gpu else 'On the CPU'}: {', '.join(changes)}"
