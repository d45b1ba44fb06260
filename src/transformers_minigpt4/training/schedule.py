"""The authors' learning-rate schedule, which differs from all of transformers' own."""

import math
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def minigpt4_learning_rate(
    step: int,
    *,
    learning_rate: float,
    min_learning_rate: float,
    warmup_start_lr: float,
    warmup_steps: int,
    iters_per_epoch: int,
    total_steps: int,
) -> float:
    """
    The rate of one step: linear warm-up within the first epoch, then a cosine over **all** steps.

    The cosine counts from step 0, so the rate drops when warm-up ends (from 9.998e-5 to 9.707e-5 in stage 1);
    transformers' `cosine_warmup_with_min_lr` counts from the end of warm-up. Source: `LinearWarmupCosineLRScheduler`
    of the authors' code, pinned by `lr_schedule` in the golden files.

    Args:
        step (`int`): Optimizer steps done before this one.
        learning_rate, min_learning_rate (`float`): Highest rate, and the rate that the cosine ends at.
        warmup_start_lr (`float`): Rate of step 0.
        warmup_steps (`int`): Steps from there to `learning_rate`.
        iters_per_epoch (`int`): Steps of an epoch; warm-up, and a plateau at `learning_rate`, last at most the first.
        total_steps (`int`): Steps of all epochs.
    """
    if step < iters_per_epoch:
        progress = step / max(warmup_steps, 1)
        return min(learning_rate, warmup_start_lr + (learning_rate - warmup_start_lr) * progress)
    progress = min(step / total_steps, 1.0)  # a run beyond its end stays at the floor
    return min_learning_rate + (learning_rate - min_learning_rate) * 0.5 * (1 + math.cos(math.pi * progress))


def check_floor(min_lr: float, learning_rate: float) -> None:
    """
    Raises:
        ValueError: for a floor below zero or above the highest rate.
    """
    if not 0 <= min_lr <= learning_rate:
        raise ValueError(f"The floor min_lr={min_lr} is outside of 0 … learning_rate={learning_rate}. Lower it.")


def _factor(step: int, settings: dict[str, Any]) -> float:
    return minigpt4_learning_rate(step, **settings) / settings["learning_rate"]


def get_minigpt4_schedule(
    optimizer: Optimizer,
    num_training_steps: int,
    num_warmup_steps: int,
    min_lr: float,
    warmup_start_lr: float = 1e-6,
    iters_per_epoch: int | None = None,
) -> LambdaLR:
    """
    The authors' schedule for an optimizer at its highest rate; see [`minigpt4_learning_rate`].

    Args:
        optimizer (`Optimizer`): Its default rate is the highest one.
        num_training_steps (`int`): Steps of the complete run, over all epochs.
        num_warmup_steps (`int`): Steps of warm-up.
        min_lr (`float`): The floor.
        warmup_start_lr (`float`, *optional*, defaults to 1e-6): Rate of the first step.
        iters_per_epoch (`int`, *optional*):
            Steps of one of the authors' epochs. By default those of warm-up, as in both their stages.

    Raises:
        ValueError: for a floor above the highest rate.
    """
    learning_rate = optimizer.defaults["lr"]
    check_floor(min_lr, learning_rate)
    settings = {
        "learning_rate": learning_rate,
        "min_learning_rate": min_lr,
        "warmup_start_lr": warmup_start_lr,
        "warmup_steps": num_warmup_steps,
        "iters_per_epoch": num_warmup_steps if iters_per_epoch is None else iters_per_epoch,
        "total_steps": num_training_steps,
    }
    return LambdaLR(optimizer, partial(_factor, settings=settings))
