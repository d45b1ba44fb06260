"""Every recipe parses, has the paper's numbers, and trains two steps on a tiny model of its architecture."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import save_blip2, save_llava, save_minigpt4, save_modern, write_sources
from transformers import AutoModelForImageTextToText, set_seed

from transformers_minigpt4.training.sft import find_recipe, main, parse_recipe, recipe_names


SMALL = (
    *("--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--dataloader_num_workers", "0"),
    *("--max_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--save_steps", "2", "--logging_steps", "1", "--check_first_loss", "false", "--report_to", "none"),
    *("--dataloader_pin_memory", "false", "--disable_tqdm", "true"),
)


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def models(golden, tmp_path_factory):
    """Folders of tiny models by what recipes ask for."""
    folder = tmp_path_factory.mktemp("models")
    save_minigpt4(folder / "minigpt4", golden)
    save_minigpt4(folder / "llama2", golden, template="llama_2")
    save_minigpt4(folder / "no_qformer", golden, qformer=False)
    save_minigpt4(folder / "three_layers", golden, layers=3)
    save_modern(folder / "modern")
    save_llava(folder / "llava")
    save_blip2(folder / "blip2")
    return folder


def model_of(name: str) -> str | None:
    if name.startswith("tiny"):
        return None
    for part in ("no_qformer", "three_layers", "llama2", "modern", "llava_", "blip2"):
        if part in name:
            return part.rstrip("_")
    return "minigpt4"


def run(recipe, folder, model, source, *more):
    arguments = ["--config", recipe, *SMALL, "--output_dir", str(folder)]
    if model is not None:
        arguments += ["--model_name_or_path", str(model), "--sources", source]
    main(*parse_recipe([*arguments, *more]))
    return folder


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_trains(name, models, sources, tmp_path):
    recipe = yaml.safe_load(Path(find_recipe(name)).read_text())
    kind = recipe["sources"][0].split(":")[0]
    model, source = model_of(name), sources.get(kind)
    start = None if model is None else models / model
    if recipe.get("requires_stage1"):
        first = name.split("_stage2")[0] + "_stage1"
        first = first if first in recipe_names() else "minigpt4_stage1"
        first = "tiny" if name.startswith("tiny") else first
        start = run(first, tmp_path / "stage1", start, sources["wds"])
        source = source or recipe["sources"][0]
    folder = run(name, tmp_path / "out", start, source)
    record = json.loads((folder / "checkpoint-2" / "run.json").read_text())
    parts = recipe["train_parts"]
    trained = record["trainable_parameters"]
    for part, words in (
        ("projection", "projec"),
        ("qformer", "qformer."),
        ("language_model", "language_model.layers"),
    ):
        assert any(words in name and "lora" not in name for name in trained) == (part in parts), part
    assert any("lora_" in name for name in trained) == ("lora" in parts)
    losses = [json.loads(line)["loss"] for line in (folder / "checkpoint-2" / "loss.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert (folder / "checkpoint-2" / "loss.png").stat().st_size > 0
    if "lora" not in parts:
        saved = load_file(folder / "checkpoint-2" / "model.safetensors")
        assert set(saved) == set(trained)
        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
        for key, value in saved.items():
            assert torch.equal(loaded[key], value), key
    else:
        assert (folder / "checkpoint-2" / "adapter_model.safetensors").is_file()
        assert any("multi_modal_projector" in key for key in load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.endswith("_stage1") and not n.startswith("llava")])
def test_stage_1_has_the_papers_numbers(name):
    stage, config, _ = parse_recipe(["--config", name, "--bf16", "false", "--use_cpu", "true"])
    assert config.max_steps == 20000 and config.per_device_train_batch_size == 64
    assert (config.learning_rate, config.min_lr, config.warmup_start_lr) == (1e-4, 8e-5, 1e-6)
    assert (config.warmup_steps, config.weight_decay, config.seed) == (5000, 0.05, 42)
    assert (config.adam_beta1, config.adam_beta2, config.max_grad_norm) == (0.9, 0.999, 0.0)
    assert stage.max_completion_length == 32 and stage.form == "stage1"


@pytest.mark.parametrize(
    "name", [n for n in recipe_names() if n.endswith("_stage2") and not n.startswith(("llava", "tiny"))]
)
def test_stage_2_has_the_papers_numbers(name):
    stage, config, _ = parse_recipe(["--config", name, "--bf16", "false", "--use_cpu", "true"])
    assert config.max_steps == 1000 and config.per_device_train_batch_size == 12
    assert (config.learning_rate, config.min_lr, config.warmup_start_lr) == (3e-5, 1e-5, 1e-6)
    assert (config.warmup_steps, config.weight_decay, config.seed) == (200, 0.05, 42)
    assert stage.max_completion_length == 160 and stage.requires_stage1


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipes_header_is_whole(name):
    text = Path(find_recipe(name)).read_text()
    for heading in ("Prerequisites:", "Launch:", "Hardware:", "Expect:", "Follows:"):
        assert f"# {heading}" in text
    assert name in text.split("Launch:")[1].splitlines()[0]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--packing", "true"], "packing"),
        (["--max_length", "512"], "would cut image tokens"),
        (["--train_parts", "eyes"], "eyes"),
        (["--form", "stage9"], "stage9"),
        (["--use_peft", "true"], "contradict"),
        (["--load_in_4bit", "true", "--train_parts", "language_model"], "exclude each other"),
        (["--min_lr", "1.0"], "above learning_rate"),
        (["--max_steps", "-1"], "set max_steps"),
        (["--learning_rat", "1e-4"], "learning_rat"),
    ],
)
def test_impossible_options(arguments, words):
    with pytest.raises(ValueError, match=words):
        parse_recipe(["--config", "minigpt4_stage1", "--bf16", "false", "--use_cpu", "true", *arguments])


def test_an_unknown_key(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(Path(find_recipe("minigpt4_stage1")).read_text() + "warm_up: 3\n")
    with pytest.raises(ValueError, match="warm_up"):
        parse_recipe(["--config", str(path), "--bf16", "false", "--use_cpu", "true"])


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match="minigpt4_stage1"):
        parse_recipe(["--config", "minigpt5_stage9"])


def test_a_function_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="names no function"):
        run("tiny", tmp_path, None, None, "--sources", "python:transformers_minigpt4.demo.run:stage_9_rows")


def test_stage_2_needs_stage_1(models, sources, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of stage 1"):
        run("minigpt4_stage2", tmp_path, models / "minigpt4", sources["cc_sbu_align"])


def test_a_variant_needs_its_own_base(models, sources, tmp_path):
    with pytest.raises(ValueError, match="without Q-Former"):
        run("no_qformer_stage1", tmp_path, models / "minigpt4", sources["wds"])
    with pytest.raises(ValueError, match="3 linear layers"):
        run("three_layers_stage1", tmp_path, models / "minigpt4", sources["wds"])


def test_a_source_without_rows(models, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="lists no picture"):
        run(
            "minigpt4_stage1",
            tmp_path / "out",
            models / "minigpt4",
            f"llava:{tmp_path}/bad.json::images={tmp_path}/images",
        )


def test_the_first_loss_of_a_random_model_stops_the_run(models, sources, tmp_path):
    set_seed(0)
    with pytest.raises(RuntimeError, match="guessing"):
        run("minigpt4_stage1", tmp_path, models / "minigpt4", sources["wds"], "--check_first_loss", "true")
