"""Two processes that share a batch learn what one does; text-only batches on one of them hang nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipes import SMALL
from test_resume import base, source  # noqa: F401


SCRIPT = """
import json, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from datasets import Dataset
from test_resume import trainer_on
from tiny_models import picture

def rows(mixed):
    made = []
    for i in range(32):
        prompt, images = "<ImageHere>", [picture(i)]
        if mixed and i % 2:
            prompt, images = "###Human: Hi. ###Assistant: ", []
        made.append(dict(images=images, prompt=prompt, completion="a small dog and %d more\\n" % i))
    return Dataset.from_list(made)

settings = dict(max_steps=6, per_device_train_batch_size={batch}, save_steps={save}, ddp_backend={backend!r})
trainer = trainer_on({base!r}, {folder!r}, rows({mixed}), **settings)
trainer.train({resume})
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    json.dump(losses, open({output!r}, "w"))
"""
PATHS = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]


def launch(processes, arguments, timeout=240):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    if processes > 1:
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *run, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def losses(base, folder, processes, batch, mixed, save=6, resume=False):  # noqa: F811
    folder.mkdir(exist_ok=True)
    script, output = folder / "script.py", folder / "losses.json"
    script.write_text(
        SCRIPT.format(
            paths=PATHS,
            base=str(base),
            folder=str(folder / "run"),
            batch=batch,
            mixed=mixed,
            output=str(output),
            save=save,
            backend="gloo" if processes > 1 else None,
            resume=resume,
        )
    )
    launch(processes, [str(script)])
    return json.loads(output.read_text())


@pytest.mark.parametrize("mixed", [False, True])
def test_two_processes_are_one(base, tmp_path, mixed):  # noqa: F811
    one = losses(base, tmp_path / "one", 1, 2 if mixed else 4, mixed)
    two = losses(base, tmp_path / "two", 2, 1 if mixed else 2, mixed)
    assert len(one) == 6 and two == pytest.approx(one, abs=1e-5)
    assert len(set(one)) == 6


def test_a_stream_on_two_processes_resumes(base, source, tmp_path):  # noqa: F811
    arguments = [
        *("-m", "transformers_minigpt4.training.sft", "--config", "minigpt4_stage1", *SMALL),
        *("--model_name_or_path", str(base), "--sources", source, "--ddp_backend", "gloo"),
        *("--learning_rate", "1e-2", "--max_steps", "6", "--warmup_steps", "2", "--save_steps", "3"),
    ]
    launch(2, [*arguments, "--output_dir", str(tmp_path / "whole")])
    curve = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "loss.jsonl").read_text().splitlines()]
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    more = ["--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", str(checkpoint)]
    launch(2, [*arguments, *more])
    again = [json.loads(line)["loss"] for line in (tmp_path / "parts" / "loss.jsonl").read_text().splitlines()]
    assert len(curve) == 6 and again == curve
