"""The schedule is the authors' own at every step that the golden files pin."""

import json

import pytest
import torch
from golden_model import GOLDEN

from transformers_minigpt4.training.schedule import get_minigpt4_schedule


CASES = json.loads((GOLDEN / "extras.json").read_text())["lr_schedule"]


@pytest.mark.parametrize("name", CASES)
def test_golden_rates(name):
    config = CASES[name]["config"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config["init_lr"])
    total = config["max_epoch"] * config["iters_per_epoch"]
    schedule = get_minigpt4_schedule(
        optimizer, total, config["warmup_steps"], config["min_lr"], config["warmup_start_lr"]
    )
    wanted = {epoch * config["iters_per_epoch"] + step: rate for epoch, step, rate in CASES[name]["epoch_step_lr"]}
    for step in range(total):
        if step in wanted:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted.pop(step), rel=1e-12)
        optimizer.step()
        schedule.step()
    assert not wanted
    assert optimizer.param_groups[0]["lr"] == pytest.approx(config["min_lr"])


def test_a_warm_up_shorter_than_the_epoch_rests_at_the_top():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    get_minigpt4_schedule(optimizer, 100, 10, 1e-4, iters_per_epoch=50).step(20)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_a_floor_above_the_top():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    with pytest.raises(ValueError, match="floor"):
        get_minigpt4_schedule(optimizer, 100, 10, 1e-2)
