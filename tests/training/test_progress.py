"""What a run shows, on a terminal and elsewhere; a finished run; epochs; recipes for GPUs on a CPU; Ctrl-C."""

import fcntl
import hashlib
import io
import json
import logging
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import program
from training_runs import model_folder, rows, run, sources, trainer_on
from transformers import TrainerControl, TrainerState

from transformers_minigpt4.training import checkpoints, cpu_settings
from transformers_minigpt4.training.loading import load_rows
from transformers_minigpt4.training.next_commands import commands_after
from transformers_minigpt4.training.progress import TrainingProgress, log_fields
from transformers_minigpt4.training.recipe import parse_recipe
from transformers_minigpt4.training.schedule import minigpt4_learning_rate
from transformers_minigpt4.training.sft import main
from transformers_minigpt4.training.stream import StreamEpochs


LINE = r"step={}/5 loss=\d+\.\d{{4}} lr=\d\.\d{{3}}e-\d\d samples/s=\S+ epoch={:.3f} eta=0:\d\d:\d\d"
FOOTER = ["checkpoint", "curves", "next", "next", "next"]
STEPS = ("--max_steps", "5", "--save_steps", "5", "--logging_steps", "2", "--warmup_steps", "1")


def words(folder: Path, *more: str) -> list[str]:
    """A recipe for GPUs, as far as it fits a tiny model."""
    return [
        *("--config", "minigpt4_stage2", "--model", str(model_folder("minigpt4")), "--sources"),
        *(sources()["cc_sbu_align"], "--output", str(folder), "--requires_stage1", "false", "--batch-size", "2"),
        *("--check_first_loss", "false", "--dataloader_num_workers", "0", *STEPS, *more),
    ]


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a finished run, and what the run printed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_settings, "has_accelerator", lambda: False)
        patch.setattr("transformers_minigpt4.training.arguments.has_accelerator", lambda: False)
        patch.setattr(sys, "stdout", io.StringIO())
        main(*parse_recipe(words(folder)), recipe="minigpt4_stage2")
        return folder, sys.stdout.getvalue().splitlines()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("transformers_minigpt4.training.arguments.has_accelerator", lambda: False)


# Off a terminal


def test_a_run_prints_header_lines_and_footer(finished):
    folder, printed = finished
    assert printed[0] == "No GPU: bf16 → fp32, dtype bfloat16 → float32"
    labels = [line.partition(": ")[0] for line in printed]
    assert labels[1:6] == ["model", "rows", "steps", "device", "output"]
    assert re.search(r"minigpt4, [\d,]+ of [\d,]+ parameters are trained", printed[1])
    assert printed[2:6] == [
        "rows: 30",
        "steps: 5, effective batch 2, epochs 0.333",
        "device: cpu, float32",
        f"output: {folder}",
    ]
    logged = [line for line in printed if line.startswith("step=")]
    assert len(logged) == 3
    for step, line in zip((1, 2, 4), logged):  # the first, and every second
        assert re.fullmatch(LINE.format(step, step * 2 / 30), line), line
    assert labels[-6:] == ["done", *FOOTER] and printed[-5] == f"checkpoint: {folder}"
    assert f"minigpt4 describe IMAGE --model {folder}" in printed[-3]


def test_what_ran_is_recorded(finished):
    info = json.loads((finished[0] / "run.json").read_text())
    assert (info["recipe"]["bf16"], info["recipe"]["dtype"], info["device"]) == (False, "float32", "cpu")
    assert info["changed_for_the_cpu"] == ["bf16 → fp32", "dtype bfloat16 → float32"]


@pytest.mark.parametrize("resume", [[], ["true"], ["{}/checkpoint-5"]])
def test_a_finished_run_is_complete(finished, resume, no_gpu, capsys):
    folder, _ = finished
    before = digests(folder)
    more = ["--resume_from_checkpoint", *(value.format(folder) for value in resume)] if resume else []
    main(*parse_recipe(words(folder, *more)), recipe="minigpt4_stage2")
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in printed[1:]] == ["complete", *FOOTER]
    assert "all 5 steps" in printed[1] and str(folder) in printed[2]
    assert digests(folder) == before


def test_another_run_into_a_finished_folder_is_refused_before_the_model_is_loaded(finished, no_gpu, monkeypatch):
    monkeypatch.setattr("transformers_minigpt4.training.sft.load_model", None)
    with pytest.raises(ValueError, match=r"contains checkpoint-5 of an earlier run"):
        main(*parse_recipe(words(finished[0], "--learning_rate", "1e-3")))
    with pytest.raises(ValueError, match=r"--resume-from-checkpoint gone is not a folder"):
        main(*parse_recipe(words(finished[0], "--learning_rate", "1e-3", "--resume_from_checkpoint", "gone")))


def test_a_run_killed_before_its_last_save_only_saves(finished, no_gpu, tmp_path, capsys):
    folder = finished[0]
    main(*parse_recipe(words(tmp_path / "other", "--resume_from_checkpoint", str(folder / "checkpoint-5"))))
    assert "resumed: at step 5" in capsys.readouterr().out
    name = "model.safetensors"
    assert (tmp_path / "other" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("wrong", [["--model", "/no/gone"], ["--sources", "table:gone.csv"]])
def test_a_run_that_cannot_begin_leaves_no_folder(wrong, no_gpu, tmp_path):
    with pytest.raises(ValueError, match=r"gone"):
        main(*parse_recipe(words(tmp_path / "out", *wrong)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "prompt_format", "first"),
    [
        ("minigpt4_stage1", "stage1", "minigpt4 train minigpt4_stage2 --model 'my out'"),
        ("minigpt4_stage1_llava558k", "stage1", "minigpt4 train minigpt4_stage2 --model 'my out'"),
        ("no_qformer_stage1", "stage1", "minigpt4 train no_qformer_stage2 --model 'my out'"),
        ("tiny", "stage1", "minigpt4 train tiny_stage2 --model 'my out'"),
        ("recipes/mine.yaml", "stage1", "minigpt4 train minigpt4_stage2 --model 'my out'"),
        ("tiny_stage2", "stage2", "minigpt4 describe IMAGE --model 'my out'"),
        (None, "messages", "minigpt4 describe IMAGE --model 'my out'"),
    ],
)
def test_next_commands(recipe, prompt_format, first):
    assert commands_after(recipe, prompt_format, "my out")[0] == first


@pytest.mark.parametrize(
    ("name", "config", "merge"),
    [
        ("config.json", {"base_checkpoints": [{"name_or_path": "/models/base", "revision": None}]}, True),
        ("config.json", {"base_checkpoints": [{"name_or_path": "me/base", "revision": "abc"}]}, False),
        ("config.json", {}, False),  # a complete model
        ("adapter_config.json", {"base_model_name_or_path": "/models/base"}, True),
        ("adapter_config.json", {"base_model_name_or_path": "me/base"}, False),
    ],
)
def test_the_command_to_publish_fits_the_base(name, config, merge, tmp_path):
    (tmp_path / name).write_text(json.dumps(config))
    assert commands_after(None, "messages", str(tmp_path))[-1].endswith("NAMESPACE/NAME" + " --merge" * merge)


def test_log_entries():
    logs = {"eval_loss": 1.23456, "eval_runtime": 2.0, "epoch": 0.5}
    assert log_fields(logs) == {"eval_loss": "1.2346", "epoch": "0.500"}
    assert log_fields({"train_runtime": 3.0, "epoch": 1.0}) == {}


# On a terminal


class Terminal:
    """A pseudo-terminal as standard output; `text` is what it got."""

    def __init__(self, monkeypatch, columns: int = 90, known: bool = True) -> None:
        self.master, slave = pty.openpty()
        if known:  # otherwise it says 0, as in some containers
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        monkeypatch.setattr(sys, "stdout", os.fdopen(slave, "w", encoding="utf-8"))
        monkeypatch.setattr(sys, "stderr", sys.stdout)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        os.set_blocking(self.master, False)

    def text(self) -> str:
        sys.stdout.flush()
        found = b""
        while True:
            try:
                found += os.read(self.master, 65536)
            except BlockingIOError:
                return found.decode()


def steps(progress: TrainingProgress, count: int, start: int = 0, disable_tqdm: bool = False, rank: int = 0) -> None:
    """What a trainer calls in `count` steps out of 10, with a log entry for each."""
    args = SimpleNamespace(disable_tqdm=disable_tqdm)
    state = TrainerState(max_steps=10, global_step=start, is_world_process_zero=rank == 0)
    for _ in range(count):
        progress.on_step_begin(args, state, TrainerControl())
        state.global_step += 1
        progress.on_step_end(args, state, TrainerControl())
        logs = {"loss": 2.5, "learning_rate": 1e-4, "samples_per_second": 12.3456, "epoch": 0.5}
        progress.on_log(args, state, TrainerControl(), logs=logs)


def test_the_bar(monkeypatch):
    terminal = Terminal(monkeypatch)
    progress = TrainingProgress()
    steps(progress, 3, start=4)
    logging.getLogger("transformers_minigpt4.any").warning("skipped a row")
    progress.close()
    shown = terminal.text()
    frames = [frame.strip() for frame in re.split(r"[\r\n]+", shown) if frame.strip()]
    assert frames[0].startswith("4/10 |")  # where the run was resumed
    assert re.fullmatch(r"7/10 \|.*\| loss 2\.5000, .* left, lr 1\.000e-04, 12\.35 samples/s", frames[-1])
    assert "skipped a row" in frames and shown.endswith("\n")


@pytest.mark.parametrize("known", [True, False])
def test_a_narrow_terminal(known, monkeypatch):
    terminal = Terminal(monkeypatch, columns=30, known=known)
    progress = TrainingProgress()
    steps(progress, 2)
    progress.close()
    frames = re.split(r"[\r\n]+", terminal.text())
    assert max(map(len, frames)) <= 30 and any("2/10" in frame and "loss 2.5" in frame for frame in frames)


@pytest.mark.parametrize(
    ("options", "term", "shown"),
    [({"disable_tqdm": True}, "xterm", True), ({}, "dumb", True), ({"rank": 1}, "xterm", False)],
)
def test_no_bar(options, term, shown, monkeypatch):
    terminal = Terminal(monkeypatch)
    monkeypatch.setenv("TERM", term)
    steps(TrainingProgress(), 2, **options)
    lines = terminal.text().splitlines()
    assert len(lines) == (2 if shown else 0) and all(line.startswith("step=") for line in lines)


def test_ctrl_c_on_a_terminal(tmp_path):
    """As from a terminal, the signal reaches data workers too."""
    command = [sys.executable, "-m", "transformers_minigpt4.cli", "train", *words(tmp_path / "out")[1:]]
    more = ["--max_steps", "100000", "--use_cpu", "true", "--bf16", "false", "--dataloader_num_workers", "1"]
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    pipes = {"stdout": slave, "stderr": slave, "env": environment, "start_new_session": True}
    with program([*command, *more], **pipes) as process:
        os.close(slave)
        found = read_until(master, b"samples/s")
        os.killpg(process.pid, signal.SIGINT)
        after = read_until(master, None)
        assert process.wait(60) == 130, found[-3000:] + after
    said = [line for line in re.split(r"[\r\n]+", after) if line and "/100000 |" not in line]
    assert len(said) == 1 and said[0].startswith("minigpt4: stopped; `minigpt4 train minigpt4_stage2 --model "), said
    assert "--dataloader_num_workers 1 --resume-from-checkpoint true` resumes from the last checkpoint" in said[0]


def read_until(master: int, words: bytes | None, seconds: float = 120) -> str:
    """What a terminal got until it has certain words, or until its program ended."""
    found, deadline = b"", time.monotonic() + seconds
    while words is None or words not in found:
        ready, _, _ = select.select([master], [], [], max(0, deadline - time.monotonic()))
        try:
            part = os.read(master, 65536) if ready else b""
        except OSError:  # Linux says so when nobody has the terminal open
            part = b""
        if not part:
            break
        found += part
    return found.decode(errors="replace")


def test_ctrl_c_during_a_save(tmp_path, monkeypatch):
    real, saves = checkpoints.save_trained, []

    def save(*arguments, **keywords):
        saves.append(real(*arguments, **keywords))
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_trained", save)
    with pytest.raises(KeyboardInterrupt):
        trainer_on(model_folder("minigpt4"), tmp_path, rows()).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


# Epochs


@pytest.mark.parametrize(("more", "expected"), [([], 23), (["--gradient_accumulation_steps", "2"], 12)])
def test_epochs_of_sources_of_known_length(more, expected, no_gpu, tmp_path):
    options = words(tmp_path / "out", "--num-train-epochs", "1.5", *more)
    place = options.index("--max_steps")
    del options[place : place + 2]
    stage, config, _ = parse_recipe(options)
    assert config.max_steps == -1  # in spite of the recipe's own
    loaded = load_rows(stage, config)
    assert loaded.length == 30 and config.max_steps == expected


def test_epochs_need_a_length(no_gpu, tmp_path):
    with pytest.raises(ValueError, match=r"num_train_epochs=1 needs sources .* python:a:b is not known"):
        parse_recipe(["--config", "tiny", "--num-train-epochs", "1", "--sources", "python:a:b"])


def test_a_stream_saves_after_each_epoch():
    """Of 5 rows, with batches of 2: after steps 3 and 5 of 6."""
    args = SimpleNamespace(
        **{"train_batch_size": 2, "gradient_accumulation_steps": 1, "world_size": 1},
        **{"save_strategy": "epoch", "eval_strategy": "no", "logging_strategy": "steps"},
    )
    state, saved, epochs = TrainerState(max_steps=6), [], []
    for state.global_step in range(1, 7):
        control = TrainerControl()
        StreamEpochs(5).on_step_end(args, state, control)
        saved += [state.global_step] if control.should_save else []
        epochs.append(state.epoch)
        assert not control.should_evaluate and not control.should_log
    assert saved == [3, 5] and epochs == [0.4, 0.8, 1.2, 1.6, 2.0, 2.4]


def test_a_stream_of_unknown_length_has_no_epoch(tmp_path):
    folder = run("minigpt4_stage1", tmp_path / "out", model_folder("minigpt4"), sources()["wds"])
    entries = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    assert len(entries) == 2 and all("epoch" not in entry and "samples_per_second" in entry for entry in entries)


# Recipes for GPUs on a CPU


def test_a_recipe_for_gpus_fits_a_cpu(no_gpu):
    more = ["--fp16", "true", "--bf16", "false", "--attn_implementation", "flash_attention_2", "--tf32", "true"]
    _, config, model_args = parse_recipe(["--config", "minigpt4_stage2_qlora", *more, "--optim", "paged_adamw_8bit"])
    assert (config.fp16, config.bf16, config.use_cpu, str(config.device)) == (False, False, True, "cpu")
    assert (model_args.dtype, model_args.load_in_4bit, model_args.attn_implementation) == ("float32", False, "sdpa")
    assert cpu_settings.changes_line(config.changes, config.without_gpu) == (
        "No GPU: fp16 → fp32, tf32 → off, optim paged_adamw_8bit → adamw_torch, "
        "attn_implementation flash_attention_2 → sdpa, dtype bfloat16 → float32, load_in_4bit → off"
    )


def test_a_recipe_for_the_cpu_keeps_what_works_there():
    _, config, model_args = parse_recipe(["--config", "minigpt4_stage2_qlora", "--use_cpu", "true"])
    assert config.bf16 and model_args.load_in_4bit and model_args.dtype == "bfloat16" and config.changes == []
    _, config, _ = parse_recipe(
        ["--config", "minigpt4_stage2", "--use_cpu", "true", "--fp16", "true", "--bf16", "false"]
    )
    assert not config.fp16 and config.changes == ["fp16 → fp32"]


# The schedule


def test_a_smaller_batch_starts_the_schedule_anew(tmp_path):
    """`auto_find_batch_size`, when memory runs out in the second step."""
    trainer = trainer_on(
        model_folder("minigpt4"), tmp_path, rows(), auto_find_batch_size=True, save_strategy="no", warmup_start_lr=1e-6
    )
    step, calls = trainer.training_step, []

    def training_step(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(*arguments)

    trainer.training_step = training_step
    trainer.train()
    settings = {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_start_lr": 1e-6, "warmup_steps": 2}
    wanted = [minigpt4_learning_rate(at, **settings, iters_per_epoch=2, total_steps=4) for at in range(4)]
    found = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[-4:] == pytest.approx(wanted)
