"""A run killed at any step goes on to the very bits of one that was not; checkpoints are whole or absent."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_recipes import SMALL
from tiny_models import picture, save_minigpt4, write_sources
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer
from trl import SFTTrainer

from transformers_minigpt4.training.arguments import StageConfig
from transformers_minigpt4.training.checkpoints import run_lock, save_trained
from transformers_minigpt4.training.collator import make_collator
from transformers_minigpt4.training.guards import GuardCallback, TrainingError
from transformers_minigpt4.training.sft import main, parse_recipe
from transformers_minigpt4.training.stages import prepare_stage
from transformers_minigpt4.training.stream import PositionedStream
from transformers_minigpt4.training.trainer import StageSFTTrainer, StageTrainer


STEPS = 12


@pytest.fixture(scope="module")
def base(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_minigpt4(folder, golden)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"), 30)["wds"]


def command(base, source, folder, *more):
    return [
        *("--config", "minigpt4_stage1", *SMALL, "--model_name_or_path", str(base), "--sources", source),
        *("--output_dir", str(folder), "--max_steps", str(STEPS), "--save_steps", "1", "--learning_rate", "1e-2"),
        *("--warmup_steps", "3", "--save_total_limit", "20", *more),
    ]


def start(arguments, log):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "transformers_minigpt4.training.sft", *arguments],
        env=environment,
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("workers", ["0", "2"])
def test_sigkill_and_resume_give_the_same_bits(base, source, tmp_path, workers):
    more = ("--dataloader_num_workers", workers)
    main(*parse_recipe(command(base, source, tmp_path / "whole", *more)))
    folder, log = tmp_path / "killed", tmp_path / "log"
    process = start(command(base, source, folder, *more), log)
    goal = random.Random(os.getpid()).randint(2, STEPS - 3)
    deadline = time.monotonic() + 120
    while not (folder / f"checkpoint-{goal}").exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert reached[-1] < STEPS, "the run ended before it was killed"
    for step in reached:
        assert (folder / f"checkpoint-{step}" / "trainer_state.json").is_file()
        load_file(folder / f"checkpoint-{step}" / "model.safetensors")
    main(*parse_recipe(command(base, source, folder, *more, "--resume_from_checkpoint", "true")))
    found, wanted = load_file(folder / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    started = load_file(base / "model.safetensors")
    assert all(not torch.equal(started[name], value) for name, value in found.items())
    curves = [
        [(row["step"], row["loss"], row["learning_rate"]) for row in map(json.loads, path.read_text().splitlines())]
        for path in (folder / "loss.jsonl", tmp_path / "whole" / "loss.jsonl")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == STEPS


def rows(count=16):
    return Dataset.from_list(
        [
            {"images": [picture(i)], "prompt": "<ImageHere>", "completion": f"a small dog and {i} more\n"}
            for i in range(count)
        ]
    )


def trainer_on(base, folder, data, trainer_class=StageSFTTrainer, **settings):
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(base)
    prepare_stage(model)
    settings = {
        **{"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1, "bf16": False},
        **{"use_cpu": True, "report_to": "none", "activation_checkpointing": False, "learning_rate": 1e-2},
        **{"disable_tqdm": True, "min_lr": 1e-3, "warmup_steps": 2, "dataloader_pin_memory": False},
        **settings,
    }
    return trainer_class(
        model=model,
        args=StageConfig(str(folder), **settings),
        train_dataset=data,
        data_collator=make_collator(model, processor, 32),
        processing_class=processor,
    )


def projection(trainer):
    return trainer.model.model.multi_modal_projector.linear_1.weight.detach().clone()


def test_lists_resume_too(base, tmp_path):
    whole = trainer_on(base, tmp_path / "whole", rows())
    whole.train()
    trainer_on(base, tmp_path / "parts", rows(), max_steps=4).train()
    import shutil

    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    second = trainer_on(base, tmp_path / "parts", rows())
    second.train(resume_from_checkpoint=True)
    assert torch.equal(projection(whole), projection(second))


def test_all_trainers_share_one_path(base, tmp_path):
    """`SFTTrainer` and `Trainer`, plain and with our additions, take the same steps."""
    found = []
    for number, kind in enumerate((StageSFTTrainer, StageTrainer, SFTTrainer, Trainer)):
        plain = number > 1
        settings = {"min_lr": None} if not plain else {"min_lr": None, "save_strategy": "no"}
        trainer = trainer_on(base, tmp_path / str(number), rows(), kind, **settings)
        trainer.train()
        found.append(projection(trainer))
    for other in found[1:]:
        # TRL's fused head counts the image token's row in the softmax, which the model's own loss leaves out.
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-3)


def test_checkpoints_hold_trained_parts_alone(base, tmp_path):
    trainer = trainer_on(base, tmp_path, rows())
    trainer.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert set(load_file(checkpoint / "model.safetensors")) == {
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_1.bias",
    }
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(states["state"]) == 2
    decays = [group["weight_decay"] for group in states["param_groups"]]
    assert len(decays) == 2 and decays[1] == 0.0
    assert not (tmp_path / ".saving").exists() or not any((tmp_path / ".saving").iterdir())


def test_gathered_tensors_of_a_sharded_model_load_by_name(base, tmp_path):
    trainer = trainer_on(base, tmp_path / "run", rows(), save_strategy="no")
    trainer.train()
    save_trained(trainer.model, tmp_path / "saved", trainer.model.state_dict())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(loaded.model.multi_modal_projector.linear_1.weight, projection(trainer))
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(loaded.config.trained_parameters)


def test_weight_decay_spares_the_bias(base, tmp_path, golden):
    trainer = trainer_on(base, tmp_path, rows(), weight_decay=0.05)
    trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = [
        (g["weight_decay"], [names[id(p)].split(".")[-1] for p in g["params"]]) for g in trainer.optimizer.param_groups
    ]
    recorded = golden["checkpoint"]["optimizer_param_groups"]
    assert groups == [(g["weight_decay"], [name.split(".")[-1] for name in g["params"]]) for g in recorded]


def test_a_folder_with_checkpoints_is_not_written_over(base, tmp_path):
    trainer_on(base, tmp_path, rows()).train()
    with pytest.raises(ValueError, match="checkpoint-4 of an earlier run"):
        trainer_on(base, tmp_path, rows()).train()


def test_two_runs_in_one_folder(base, tmp_path):
    with run_lock(tmp_path), pytest.raises(RuntimeError, match=f"process {os.getpid()}"):
        trainer_on(base, tmp_path, rows()).train()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(str(tmp_path))], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match=f"process {other.pid}"):
        trainer_on(base, tmp_path, rows()).train()
    other.kill()
    other.wait()
    trainer_on(base, tmp_path, rows()).train()


HOLD = """
from transformers_minigpt4.training.checkpoints import run_lock, save_trained
with run_lock({!r}):
    print("held", flush=True)
    input()
"""


def test_a_checkpoint_of_another_width(base, golden, tmp_path):
    trainer = trainer_on(base, tmp_path / "run", rows())
    trainer.train()
    from safetensors.torch import save_file

    path = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    save_file({name: torch.zeros(7, *value.shape[1:]) for name, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="another width"):
        trainer_on(base, tmp_path / "run", rows()).train(resume_from_checkpoint=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole(base, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import resource, sys
            sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
            from test_resume import rows, trainer_on
            from transformers import TrainerCallback

            class Full(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    if state.global_step == 3:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

            trainer = trainer_on({str(base)!r}, {str(tmp_path / "run")!r}, rows())
            trainer.add_callback(Full())
            trainer.train()
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "checkpoint-4 could not be written" in done.stderr and "checkpoint-2 is whole" in done.stderr, done.stderr[
        -2000:
    ]
    run = tmp_path / "run"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"] and not (run / ".saving").exists()
    resumed = trainer_on(base, run, rows())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


# Streams


def stream_rows(count=20, shards=4):
    return Dataset.from_dict({"n": list(range(count))}).to_iterable_dataset(num_shards=shards)


def take(stream, count):
    found = []
    for row, position in stream:
        found.append((row["n"], position) if row is not None else (None, None))
        if len(found) == count:
            return found


def test_a_stream_goes_on_with_the_next_row():
    whole = [n for n, _ in take(PositionedStream(stream_rows(), 2), 50)]
    assert sorted(whole[:20]) == list(range(20)) == sorted(whole[20:40])
    for stop in (2, 6, 18, 20, 22, 38):
        position = take(PositionedStream(stream_rows(), 2), stop)[-1][1]
        resumed = [n for n, _ in take(PositionedStream(stream_rows(), 2, start={0: position}), 50)]
        assert resumed[:stop] == [None] * stop and resumed[stop:] == whole[stop:]


@pytest.mark.parametrize(("world", "shards"), [(2, 4), (3, 4), (4, 2)])
def test_ranks_share_a_stream_without_overlap_or_loss(world, shards):
    found = []
    for rank in range(world):
        stream = PositionedStream(stream_rows(24, shards), 1, rank, world)
        seen = []
        for row, position in stream:
            if position.epoch:
                break
            seen.append(row["n"])
        found += seen
    assert sorted(found) == list(range(24))


def test_an_empty_stream(base, tmp_path):
    empty = stream_rows().filter(lambda row: False)
    with pytest.raises(ValueError, match="no usable row"):
        trainer_on(base, tmp_path, empty)


# Guards


def test_nan_stops_before_the_weights_are_spoilt(base, tmp_path):
    trainer = trainer_on(base, tmp_path, rows())
    trainer.add_callback(GuardCallback(check_first_loss=False))
    before = projection(trainer)
    with torch.no_grad():
        trainer.model.model.vision_tower.post_layernorm.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match="NaN or infinity in the gradients of step 1"):
        trainer.train()
    assert torch.equal(projection(trainer), before)


def test_a_frozen_parameter_with_a_gradient_stops_the_run(base, tmp_path):
    from transformers import TrainerCallback

    class Thaw(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.lm_head.requires_grad_(True)

    trainer = trainer_on(base, tmp_path, rows())
    trainer.add_callback(GuardCallback(check_first_loss=False))
    trainer.add_callback(Thaw())
    with pytest.raises(TrainingError, match=r"frozen parameter lm_head\.weight received a gradient"):
        trainer.train()


def test_the_first_loss_of_guessing_stops_the_run(base, tmp_path):
    trainer = trainer_on(base, tmp_path, rows())
    trainer.add_callback(GuardCallback())
    with pytest.raises(TrainingError, match=r"guessing among 1,201 words gives 7\.091"):
        trainer.train()


def test_a_stream_needs_an_end(base, tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        trainer_on(base, tmp_path, rows().to_iterable_dataset(), max_steps=-1)
