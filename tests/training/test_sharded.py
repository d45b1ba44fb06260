"""FSDP2 on two CPU processes: sharded training gives the losses of one process, with batches of text on one rank."""

import json

import pytest
from test_distributed import PATHS, launch
from test_resume import base  # noqa: F401


SCRIPT = """
import json, os, sys
sys.path[:0] = {paths!r}
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from tiny_models import picture
from transformers_minigpt4.training.collator import make_collator
from transformers_minigpt4.training.stages import prepare_stage, touch_trainable

torch.set_num_threads(1)
world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
model = AutoModelForImageTextToText.from_pretrained({base!r}, dtype=torch.float32)
processor = AutoProcessor.from_pretrained({base!r})
prepare_stage(model)
touch_trainable(model, whole_tower=True)
if world > 1:
    dist.init_process_group("gloo")
    for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
        fully_shard(layer)
    fully_shard(model)
    assert isinstance(model, FSDPModule)
    assert all(isinstance(p, DTensor) for p in model.parameters())
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
collate = make_collator(model, processor, 32)
losses = []
model.train()
for step in range(4):
    rows = []
    for i in (2 * step, 2 * step + 1):
        picture_row = not (i % 2 and step % 2)
        prompt = "<ImageHere>" if picture_row else "###Human: Hi. ###Assistant: "
        rows.append(dict(images=[picture(i)] if picture_row else [], prompt=prompt, completion="a dog and %d\\n" % i))
    count = sum((collate([row])["labels"][:, 1:] != -100).sum().item() for row in rows)
    mine = rows if world == 1 else rows[rank : rank + 1]
    loss = model(**collate(mine), num_items_in_batch=count).loss
    (loss * world).backward()  # gradients are averaged over processes, and each has its share of the loss
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    if world > 1:
        dist.all_reduce(total)
    losses.append(total.item())
if rank == 0:
    json.dump(losses, open({output!r}, "w"))
if world > 1:
    dist.destroy_process_group()
"""


def test_fsdp2_gives_the_losses_of_one_process(base, tmp_path):  # noqa: F811
    found = []
    for processes in (1, 2):
        script, output = tmp_path / f"{processes}.py", tmp_path / f"{processes}.json"
        script.write_text(SCRIPT.format(paths=PATHS, base=str(base), output=str(output)))
        launch(processes, [str(script)])
        found.append(json.loads(output.read_text()))
    assert len(set(found[0])) == 4 and found[1] == pytest.approx(found[0], abs=1e-5)
