"""A run killed at any step resumes to the exact bits of one that was not; checkpoints are complete or absent."""

import json
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from training_runs import SMALL, curve, model_folder, rows, run_main, sources, start, trainer_on, weights
from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback
from trl import SFTTrainer

from transformers_minigpt4.training.checkpoints import STAGING, publish, run_lock, save_trained
from transformers_minigpt4.training.progress import TrainingProgress
from transformers_minigpt4.training.stream import PositionedStream
from transformers_minigpt4.training.trainer import StageSFTTrainer, StageTrainer


STEPS = 8


@pytest.fixture(scope="module")
def base():
    return model_folder("minigpt4")


def command(folder, *more):
    return [
        *("--config", "minigpt4_stage1", *SMALL, "--model_name_or_path", str(model_folder("minigpt4"))),
        *("--sources", sources()["wds"], "--output_dir", str(folder), "--max_steps", str(STEPS), "--save_steps", "1"),
        *("--learning_rate", "1e-2", "--warmup_steps", "3", "--save_total_limit", "20", *more),
    ]


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "2"])
def test_sigkill_and_resume_give_the_same_bits(base, tmp_path, workers):
    more = ["--dataloader_num_workers", workers]
    if workers == "0":
        more += ["--eval_share", "0.3", "--eval_rows", "2"]
    run_main(command(tmp_path / "complete", *more))
    folder, log = tmp_path / "killed", tmp_path / "log"
    process = start(log, run_main, command(folder, *more))
    goal = random.Random(os.getpid()).randint(2, STEPS - 3)
    deadline = time.monotonic() + 120
    while not (folder / f"checkpoint-{goal}").exists():
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    reached = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert reached[-1] < STEPS, "the run ended before it was killed"
    for step in reached:
        assert (folder / f"checkpoint-{step}" / "trainer_state.json").is_file()
        load_file(folder / f"checkpoint-{step}" / "model.safetensors")
    run_main(command(folder, *more, "--resume_from_checkpoint", "true"))
    check_same(folder, tmp_path / "complete")
    started = load_file(base / "model.safetensors")
    assert all(not torch.equal(started[name], value) for name, value in weights(folder).items())


def check_same(folder, complete):
    """The same bits, and the same curve."""
    found, wanted = weights(folder), weights(complete)
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    rates = [
        [row["learning_rate"] for row in map(json.loads, (path / "loss.jsonl").read_text().splitlines())]
        for path in (folder, complete)
    ]
    assert curve(folder) == curve(complete) and rates[0] == rates[1] and len(rates[0]) == STEPS


def test_adapters_resume_to_the_same_bits(tmp_path):
    """LoRA with its dropout, and the projector."""
    more = ["--use_peft", "true", "--trainable_modules", "projector", "lora", "--lora_r", "4", "--lora_dropout", "0.2"]
    more += ["--lora_target_modules", "q_proj", "v_proj", "--save_steps", str(STEPS // 2)]
    complete, resumed = tmp_path / "complete", tmp_path / "resumed"
    run_main(command(complete, *more))
    run_main(command(resumed, *more, "--resume_from_checkpoint", str(complete / f"checkpoint-{STEPS // 2}")))
    check_same(resumed, complete)
    names = weights(complete)
    assert any("lora_B" in name and value.any() for name, value in names.items())
    assert any("multi_modal_projector" in name for name in names)


def projector(trainer):
    return trainer.model.model.multi_modal_projector.linear_1.weight.detach().clone()


def test_lists_resume_too(base, tmp_path):
    complete = trainer_on(base, tmp_path, rows())
    complete.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    second = trainer_on(base, tmp_path, rows())
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4 and torch.equal(projector(complete), projector(second))


def test_all_trainers_share_one_path(base, tmp_path):
    """`SFTTrainer` and `Trainer`, plain and with our additions, take the same steps."""
    found = []
    for number, kind in enumerate((StageSFTTrainer, StageTrainer, SFTTrainer, Trainer)):
        trainer = trainer_on(base, tmp_path / str(number), rows(), kind, min_lr=None, save_strategy="no")
        trainer.train()
        found.append(projector(trainer))
    for other in found[1:]:
        # TRL's fused head counts the image token's row in the softmax, which the model's own loss leaves out.
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-3)


def test_checkpoints_hold_only_trained_modules(base, tmp_path):
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
    assert not (tmp_path / ".saving").exists() and not (tmp_path / "README.md").exists()


def test_gathered_tensors_of_a_sharded_model_load_by_name(base, tmp_path):
    trainer = trainer_on(base, tmp_path / "run", rows(), save_strategy="no")
    trainer.train()
    save_trained(trainer.model, tmp_path / "saved", trainer.model.state_dict())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(loaded.model.multi_modal_projector.linear_1.weight, projector(trainer))
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


def test_a_folder_with_checkpoints_is_not_overwritten(base, tmp_path):
    trainer_on(base, tmp_path, rows()).train()
    with pytest.raises(ValueError, match="checkpoint-4 of an earlier run"):
        trainer_on(base, tmp_path, rows()).train()


def test_a_checkpoint_replaces_an_earlier_attempt_at_its_step(tmp_path):
    for folder, name in ((tmp_path / STAGING, "new"), (tmp_path, "old")):
        (folder / "checkpoint-4").mkdir(parents=True)
        (folder / "checkpoint-4" / name).touch()
    publish(tmp_path / STAGING / "checkpoint-4", tmp_path / "checkpoint-4")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert [path.name for path in (tmp_path / "checkpoint-4").iterdir()] == ["new"]


def test_two_runs_in_one_folder(tmp_path):
    with run_lock(tmp_path), pytest.raises(RuntimeError, match=f"process {os.getpid()}"):
        run_main(command(tmp_path))
    other = start(tmp_path / "log", hold, tmp_path)
    while not (tmp_path / "held").exists():
        assert other.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=f"process {other.pid}"):
        run_main(command(tmp_path))
    other.kill()
    other.join()
    run_main(command(tmp_path, "--max_steps", "1"))


def hold(folder):
    with run_lock(folder):
        (folder / "held").touch()
        time.sleep(600)


def test_a_checkpoint_of_another_width(base, golden, tmp_path):
    trainer = trainer_on(base, tmp_path / "run", rows())
    trainer.train()
    path = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    save_file({name: torch.zeros(7, *value.shape[1:]) for name, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="another width"):
        trainer_on(base, tmp_path / "run", rows()).train(resume_from_checkpoint=True)


def test_a_full_disk_leaves_the_last_checkpoint_complete(base, tmp_path):
    run = tmp_path / "run"
    process = start(os.devnull, fill_the_disk, base, run, tmp_path / "error")  # a log would be too long too
    process.join(200)
    error = (tmp_path / "error").read_text()
    assert "checkpoint-4 could not be written" in error and "checkpoint-2 is complete" in error
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"] and not (run / ".saving").exists()
    resumed = trainer_on(base, run, rows())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


class Full(TrainerCallback):
    """From step 3 on no file may be longer than 1,000 bytes."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def fill_the_disk(base, run, report):
    trainer = trainer_on(base, run, rows())
    trainer.remove_callback(TrainingProgress)
    trainer.add_callback(Full())
    try:
        trainer.train()
    except OSError as error:
        report.write_text(str(error))


# Streams


def stream_rows(count=20, shards=4):
    return Dataset.from_dict({"n": list(range(count))}).to_iterable_dataset(num_shards=shards)


def take(stream, count):
    found = []
    for row, position in stream:
        found.append((row["n"], position) if row is not None else (None, None))
        if len(found) == count:
            return found


def test_a_stream_resumes_with_the_next_row():
    complete = [n for n, _ in take(PositionedStream(stream_rows(), 2), 50)]
    assert sorted(complete[:20]) == list(range(20)) == sorted(complete[20:40])
    for stop in (2, 6, 18, 20, 22, 38):
        position = take(PositionedStream(stream_rows(), 2), stop)[-1][1]
        resumed = [n for n, _ in take(PositionedStream(stream_rows(), 2, start={0: position}), 50)]
        assert resumed[:stop] == [None] * stop and resumed[stop:] == complete[stop:]


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
