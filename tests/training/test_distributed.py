"""Two processes learn what one does, with DDP and with FSDP2; text-only batches on one of them hang nothing."""

import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from tiny_models import drawn_image
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from training_runs import SMALL, curve, launch, model_folder, rows, run_main, sources, trainer_on
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_minigpt4.training.collator import make_collator
from transformers_minigpt4.training.feature_building import build_features
from transformers_minigpt4.training.loss import LabeledCollator, keep_labeled
from transformers_minigpt4.training.recipe import parse_recipe
from transformers_minigpt4.training.stages import prepare_stage, touch_trainable


STEPS = 4


def ddp_losses(base, folder, mixed, batch):
    """Of each step; every batch of one row has no image on one of two processes, where rows are mixed."""
    backend = "gloo" if "RANK" in os.environ else None
    settings = {"max_steps": STEPS, "per_device_train_batch_size": batch, "save_steps": STEPS, "ddp_backend": backend}
    trainer = trainer_on(base, folder, rows(mixed=mixed), **settings)
    trainer.train()
    # Five rows for two processes: the second one runs out, and repeats a row that must not count.
    evaluated = [trainer.evaluate(rows(5, mixed))["eval_loss"]]
    return evaluated + [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fsdp2_losses(base):
    """Torch's FSDP2 on the model, because accelerate has none on the CPU."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    prepare_stage(model)
    keep_labeled(model)
    touch_trainable(model, full_tower=True)
    if world > 1:
        for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
            fully_shard(layer)
        fully_shard(model)
        assert isinstance(model, FSDPModule)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    collate = LabeledCollator(make_collator(model, AutoProcessor.from_pretrained(base), 32))
    losses = []
    model.train()
    for step in range(STEPS):
        batch = []
        for i in (2 * step, 2 * step + 1):
            shown = not (i % 2 and step % 2)
            prompt = "<ImageHere>" if shown else "###Human: Hi. ###Assistant: "
            images = [drawn_image(i)] if shown else []
            batch.append({"images": images, "prompt": prompt, "completion": f"a dog and {i}\n"})
        count = sum((collate([row])["labels"][:, 1:] != -100).sum().item() for row in batch)
        mine = batch if world == 1 else batch[rank : rank + 1]
        loss = model(**collate(mine), num_items_in_batch=count).loss
        (loss * world).backward()  # gradients are averaged over processes, and each has its share of the loss
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


def all_losses(base, folder, processes):
    """What the test compares, all in the processes of one launch."""
    found = {
        "ddp": ddp_losses(base, folder / "plain", False, 4 // processes),
        "ddp, mixed": ddp_losses(base, folder / "mixed", True, 2 // processes),
        "fsdp2": fsdp2_losses(base),
    }
    if os.environ.get("RANK", "0") == "0":
        (folder / "losses.json").write_text(json.dumps(found))


def test_two_processes_are_one(tmp_path):
    base, found = model_folder("minigpt4"), []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        if processes == 1:
            all_losses(base, folder, 1)
        else:
            launch(2, folder, all_losses, base, folder, 2)
        found.append(json.loads((folder / "losses.json").read_text()))
    for name, one in found[0].items():
        assert len(set(one)) == STEPS + name.startswith("ddp"), name
        assert found[1][name] == pytest.approx(one, abs=1e-5), name


@pytest.mark.slow
def test_a_stream_on_two_processes_resumes(tmp_path):
    """With cached features and packed rows, whose tower neither process loads, and rows held out for evaluation."""
    arguments = [
        *("--config", "minigpt4_stage1", *SMALL, "--model_name_or_path", str(model_folder("minigpt4"))),
        *("--sources", sources()["wds"]),
        *("--learning_rate", "1e-2", "--max_steps", "6", "--warmup_steps", "2", "--save_steps", "3"),
    ]
    cache = ("--feature_cache", str(tmp_path / "cache"))
    assert build_features(*parse_recipe([*arguments, *cache]))["encoded"] == 30
    arguments += [*cache, "--pack_rows", "true", "--ddp_backend", "gloo"]
    arguments += ["--eval_share", "0.3", "--eval_rows", "5", "--load_best_model_at_end", "true"]
    complete, resumed = tmp_path / "complete", tmp_path / "resumed"
    # What `accelerate launch` does on GPUs; the other processes take a shorter way into the same function.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "transformers_minigpt4.training.sft"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += [*arguments, "--output_dir", str(complete)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    resume = ["--output_dir", str(resumed), "--resume_from_checkpoint", str(complete / "checkpoint-3")]
    launch(2, tmp_path, run_main, [*arguments, *resume])
    assert len(curve(complete)) == 6 and curve(resumed) == curve(complete)
    record, again = (json.loads((folder / "run.json").read_text()) for folder in (complete, resumed))
    assert record["world_size"] == 2 and record["best_checkpoint"] == again["best_checkpoint"]
    answers = [json.loads(line) for line in (complete / "samples.jsonl").read_text().splitlines()]
    assert [answer["step"] for answer in answers] == [0] * 4 + [3] * 4 + [6] * 4


def test_the_wrapped_model_goes_before_the_process_group(tmp_path):
    """The other way round, a process of DDP now and then never ends: see `StageTrainerMixin.end`."""
    trainer = trainer_on(model_folder("minigpt4"), tmp_path, rows())
    wrapped = torch.nn.Sequential(trainer.model)
    trainer.model_wrapped = wrapped
    trainer.accelerator._models.append(wrapped)
    gone = weakref.ref(wrapped)
    del wrapped
    seen = []
    trainer.accelerator.end_training = lambda: seen.append(gone())
    trainer.end()
    assert seen == [None]
