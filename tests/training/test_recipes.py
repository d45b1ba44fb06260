"""Every recipe parses, has the paper's numbers, and trains two steps on a tiny model of its architecture."""

import functools
import json
import re
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from chat_processors import chat_processor
from tiny_models import save_chat_model, write_sources
from training_runs import SMALL, curve, model_folder, run, sources, weights
from transformers import AutoConfig, AutoModelForImageTextToText, set_seed

from transformers_minigpt4 import MiniGPT4Config
from transformers_minigpt4.training.arguments import StageArguments, check_arguments, check_model
from transformers_minigpt4.training.dry_run import first_row
from transformers_minigpt4.training.loading import find_model
from transformers_minigpt4.training.recipe import parse_recipe
from transformers_minigpt4.training.recipe_files import find_recipe, recipe_names


def model_of(name: str) -> str | None:
    if name.startswith("tiny"):
        return None
    if name.startswith("llava"):
        return "llava"
    for variant in ("no_qformer", "three_layers", "llama2", "modern", "blip2"):
        if variant in name:
            return variant
    return "minigpt4"


@functools.cache
def trained_stage_1(name: str, model: str | None) -> Path:
    """A run of stage 1 that several recipes of stage 2 build on."""
    kept = tempfile.TemporaryDirectory()
    _kept.append(kept)
    start = None if model is None else model_folder(model)
    return run(name, Path(kept.name) / "stage1", start, sources()["wds"])


_kept: list = []


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_trains(name, tmp_path):
    recipe = yaml.safe_load(Path(find_recipe(name)).read_text())
    kind = recipe["sources"][0].split(":")[0]
    model, source = model_of(name), sources().get(kind)
    start = None if model is None else model_folder(model)
    if recipe.get("requires_stage1"):
        first = "tiny" if name.startswith("tiny") else name.split("_stage2")[0] + "_stage1"
        start = trained_stage_1(first if first in recipe_names() else "minigpt4_stage1", model)
    more = ["--model_name_or_path", str(start)] if model is None and start is not None else []
    folder = run(name, tmp_path / "out", None if model is None else start, source, *more)
    record = json.loads((folder / "checkpoint-2" / "run.json").read_text())
    modules = recipe["trainable_modules"]
    trained = record["trainable_parameters"]
    for module, words in (
        ("projector", "projec"),
        ("qformer", "qformer."),
        ("language_model", "language_model.layers"),
    ):
        assert any(words in name and "lora" not in name for name in trained) == (module in modules), module
    assert any("lora_" in name for name in trained) == ("lora" in modules)
    losses = curve(folder / "checkpoint-2")
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert (folder / "checkpoint-2" / "loss.png").stat().st_size > 0
    if "lora" not in modules:
        saved = weights(folder / "checkpoint-2")
        assert set(saved) == set(trained)
        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
        for key, value in saved.items():
            assert torch.equal(loaded[key], value), key
    else:
        assert (folder / "checkpoint-2" / "adapter_model.safetensors").is_file()
        assert any("multi_modal_projector" in key for key in weights(folder))


@pytest.mark.parametrize("value", ["true", "false"])
def test_checkpointing_by_the_name_of_every_transformers(value):
    """What transformers before 5.23 reads is its older name for the recipes' key."""
    words = [
        "--config",
        "minigpt4_stage2",
        "--bf16",
        "false",
        "--use_cpu",
        "true",
        "--activation_checkpointing",
        value,
    ]
    config = parse_recipe(words)[1]
    assert config.gradient_checkpointing is config.activation_checkpointing is (value == "true")


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.endswith("_stage1") and not n.startswith("llava")])
def test_stage_1_has_the_papers_numbers(name):
    stage, config, _ = parse_recipe(["--config", name, "--bf16", "false", "--use_cpu", "true"])
    assert config.max_steps == 20000 and config.per_device_train_batch_size == 64
    assert (config.learning_rate, config.min_lr, config.warmup_start_lr) == (1e-4, 8e-5, 1e-6)
    assert (config.warmup_steps, config.weight_decay, config.seed) == (5000, 0.05, 42)
    assert (config.adam_beta1, config.adam_beta2, config.max_grad_norm) == (0.9, 0.999, 0.0)
    assert stage.max_completion_length == 32 and stage.prompt_format == "stage1"


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
def test_a_recipes_header_is_complete(name):
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
        (["--trainable_modules", "eyes"], "eyes"),
        (["--prompt-format", "stage9"], "stage9"),
        (["--use_peft", "true"], "contradict"),
        (["--load_in_4bit", "true", "--trainable_modules", "language_model"], "quantized weights cannot learn"),
        (["--min_lr", "1.0"], r"outside of 0 … learning_rate=0\.0001"),
        (["--max_steps", "-1"], "Set max_steps"),
        (["--num-train-epochs", "2"], "num_train_epochs=2 needs sources .* wds:.* Set max_steps instead"),
        (["--learning_rat", "1e-4"], "Unknown .* --learning_rat 1e-4. Did you mean learning_rate?"),
        (
            ["--feature_cache", "c", "--trainable_modules", "projector", "qformer"],
            "feature_cache and trainable_modules: qformer",
        ),
        (["--feature_cache", "c", "--fsdp", "full_shard"], "feature_cache with fsdp"),
        (["--pack_tokens", "512"], "pack_tokens=512 with pack_rows=False"),
        (["--pack_rows", "true", "--pack_tokens", "0"], "pack_tokens is 0, but must be a whole number of at least 1"),
        (["--push_to_hub", "true"], "minigpt4 push OUTPUT_DIR"),
        (["--max_steps", "many"], "max_steps.* invalid int value: 'many'"),
    ],
)
def test_impossible_options(arguments, words):
    with pytest.raises(ValueError, match=words):
        parse_recipe(["--config", "minigpt4_stage1", "--bf16", "false", "--use_cpu", "true", *arguments])


def test_impossible_options_of_the_launch(monkeypatch):
    stage, config, model_args = parse_recipe(["--config", "minigpt4_stage1", "--bf16", "false", "--use_cpu", "true"])
    stage.feature_cache = "cache"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="feature_cache with deepspeed"):
        check_arguments(stage, config, model_args)
    stage.feature_cache, stage.pack_rows, config._n_gpu = None, True, 2
    with pytest.raises(ValueError, match="pack_rows with 2 GPUs in one process"):
        check_arguments(stage, config, model_args)


@pytest.mark.parametrize("option", [{"feature_cache": "cache"}, {"pack_rows": True}])
def test_blip2_takes_neither_features_nor_packed_rows(option):
    config = AutoConfig.from_pretrained(model_folder("blip2"))
    with pytest.raises(ValueError, match=r"encoder-decoder|only features of MiniGPT-4 and LLaVA can be cached"):
        check_model(StageArguments(**option), config, "blip2")


def test_an_unknown_key(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(Path(find_recipe("minigpt4_stage1")).read_text() + "warm_up: 3\n")
    with pytest.raises(ValueError, match="warm_up"):
        parse_recipe(["--config", str(path), "--bf16", "false", "--use_cpu", "true"])


RENAMED = {
    "form": ("stage1", "prompt_format"),
    "train_parts": ("projector", "trainable_modules"),
    "max_bad_share": ("0.1", "max_error_rate"),
    "requires_projection_layers": ("1", "requires_projector_layers"),
}


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_is_refused_with_its_new_name(old, tmp_path):
    value, new = RENAMED[old]
    path = tmp_path / "recipe.yaml"
    # This recipe needs a GPU, and its keys are checked first.
    path.write_text(Path(find_recipe("minigpt4_stage1")).read_text() + f"{old}: {value}\n")
    for arguments in (["--config", str(path)], ["--config", "tiny", f"--{old.replace('_', '-')}", value]):
        with pytest.raises(ValueError, match=f"^The recipe key {old} is called {new} now") as caught:
            parse_recipe(arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["recipe", "command line"])
def test_an_old_module_is_refused_with_its_new_name(where, tmp_path):
    path = tmp_path / "recipe.yaml"
    text = Path(find_recipe("tiny")).read_text()
    path.write_text(text.replace("[projector]", "[projection]") if where == "recipe" else text)
    more = [] if where == "recipe" else ["--trainable-modules", "projection"]
    with pytest.raises(ValueError, match="`projection` is called `projector` now"):
        parse_recipe(["--config", str(path), *more])


def test_options_have_dashes_or_underscores_and_short_names():
    for words in (
        ["--feature_cache", "c", "--model_name_or_path", "m", "--per_device_train_batch_size=3", "--output_dir", "o"],
        ["--feature-cache", "c", "--model", "m", "--batch-size=3", "--output", "o"],
        ["--feature-cache=c", "--model=m", "--model-name-or-path", "m", "--batch_size", "3", "--output=o"],
    ):
        stage, config, model_args = parse_recipe(["--config", "tiny", *words])
        assert (stage.feature_cache, model_args.model_name_or_path) == ("c", "m")
        assert (config.per_device_train_batch_size, config.output_dir) == (3, "o")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "a", "--model_name_or_path", "b"], "--model a and --model_name_or_path b set the same key"),
        (["--output-dir=a", "--output", "b"], "--output-dir a and --output b set the same key, output_dir"),
        (["--feature-cache", "a", "--feature_cache", "b"], "--feature-cache a and --feature_cache b"),
    ],
)
def test_a_key_under_two_names(words, said):
    with pytest.raises(ValueError, match=said):
        parse_recipe(["--config", "tiny", *words])


def test_short_names_are_for_the_command_line_only(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(Path(find_recipe("tiny")).read_text() + "batch_size: 3\n")
    with pytest.raises(ValueError, match="In a recipe, write per_device_train_batch_size"):
        parse_recipe(["--config", str(path)])


def test_a_recipe_that_is_not_yaml(tmp_path):
    (tmp_path / "recipe.yaml").write_text("sources: [\n")
    with pytest.raises(ValueError, match=r"not valid YAML: .* line 2"):
        parse_recipe(["--config", str(tmp_path / "recipe.yaml")])


def test_one_part_and_one_source_need_no_list(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "{model_name_or_path: base, sources: 'table:a.csv', trainable_modules: projector, max_steps: 2, bf16: false}"
    )
    stage, _, _ = parse_recipe(["--config", str(tmp_path / "recipe.yaml")])
    assert stage.sources == ["table:a.csv"] and stage.trainable_modules == ["projector"]


def test_a_recipe_in_one_word_and_none_at_all():
    assert parse_recipe(["--config=tiny"])[1] == parse_recipe(["--config", "tiny"])[1]
    with pytest.raises(ValueError, match="--config needs a recipe"):
        parse_recipe(["--config"])


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match="minigpt4_stage1"):
        parse_recipe(["--config", "minigpt5_stage9"])


def test_a_function_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="names no function"):
        run("tiny", tmp_path, None, None, "--sources", "python:transformers_minigpt4.demo.run:stage_9_rows")


def test_stage_2_needs_stage_1(tmp_path):
    with pytest.raises(ValueError, match="not a checkpoint of stage 1"):
        run("minigpt4_stage2", tmp_path, model_folder("minigpt4"), sources()["cc_sbu_align"])


@pytest.mark.parametrize("key", ["projector", "projection"])  # the latter before 0.1.0
def test_a_converted_projector_counts_as_trained(key, tmp_path):
    stage, _, _ = parse_recipe(["--config", "minigpt4_stage2", "--bf16", "false", "--use_cpu", "true", "--model", "x"])
    for source, trained in (("stage1.pth", True), ("fresh", False)):
        (tmp_path / "minigpt4_sources.json").write_text(json.dumps({"settings": {key: source}}))
        with nullcontext() if trained else pytest.raises(ValueError, match="not a checkpoint of stage 1"):
            check_model(stage, MiniGPT4Config(), str(tmp_path))


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"is not a folder here.*Train stage 1 first"):
        run("minigpt4_stage2", tmp_path, str(tmp_path / "output" / "stage1"), sources()["cc_sbu_align"])
    with pytest.raises(ValueError, match=r"is not a folder here.*minigpt4 convert"):
        run("minigpt4_stage1", tmp_path, "output/base", sources()["wds"])


@pytest.mark.parametrize("recipe", ["modern", "modern_small"])
def test_the_modern_recipes_name_options_of_a_stage_2_that_fits(recipe):
    (options,) = re.findall(
        r"run minigpt4_stage2 on its output with\n#\s*(.*)\.", Path(find_recipe(recipe)).read_text()
    )
    stage, _, _ = parse_recipe(
        ["--config", "minigpt4_stage2", "--bf16", "false", "--use_cpu", "true", *options.split()]
    )
    stage.requires_stage1 = False
    check_model(stage, MiniGPT4Config(qformer_config=None), "without Q-Former")


# A prompt that is trained must be asked again


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chatml") / "base"
    save_chat_model(folder, chat_processor("smollm2"))
    return folder


OTHER_MODEL = ("--requires-stage1", "false", "--requires-qformer", "false")


@pytest.mark.parametrize(
    ("recipe", "model", "words"),
    [
        ("minigpt4_stage2", "chatml", r"<\|im_start\|>assistant.*never be asked again.*--prompt-format messages"),
        ("minigpt4_stage2", "llama2", "never be asked again. Take the recipe minigpt4_llama2_stage2, or set"),
        ("minigpt4_llama2_stage2", "no_qformer", "never be asked again. Take the recipe minigpt4_stage2, or set"),
        ("llava_stage2", "llava", "never be asked again. Take the recipe llava_stage2"),
        ("blip2_ft", "blip2", "never be asked again. Take the recipe blip2_ft"),
    ],
)
def test_a_prompt_that_would_never_be_asked_again(recipe, model, words, chatml, tmp_path):
    base = chatml if model == "chatml" else model_folder(model)
    more = ("--prompt-format", "stage2") if model in ("llava", "blip2") else OTHER_MODEL
    with pytest.raises(ValueError, match=words):
        run(recipe, tmp_path / "out", base, sources()["cc_sbu_align"], *more)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_it_is_refused_by_a_dry_run_too_and_before_any_weights(chatml, tmp_path):
    base = shutil.copytree(chatml, tmp_path / "base")
    (base / "model.safetensors").unlink()
    arguments = ["--config", "minigpt4_stage2", *SMALL, "--model", str(base), *OTHER_MODEL]
    parsed = parse_recipe([*arguments, "--sources", sources()["cc_sbu_align"]])
    with pytest.raises(ValueError, match="never be asked again"):
        first_row(*parsed)


def test_rows_of_a_function_are_in_its_own_format(chatml):
    parsed = parse_recipe(["--config", "tiny_stage2", "--model", str(chatml), *OTHER_MODEL])
    assert find_model(*parsed).name == str(chatml)


def test_a_template_that_cannot_train_is_refused_before_any_weights(chatml, tmp_path):
    base = shutil.copytree(chatml, tmp_path / "base")
    (base / "model.safetensors").unlink()
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=r"messages cannot be trained on .* would never learn to stop"):
        run("modern_small", tmp_path / "out", base, sources()["llava"])


def test_a_llava_template_without_images_is_refused_before_any_weights(tmp_path):
    base = shutil.copytree(model_folder("llava"), tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content[0].text }}{% endfor %}")
    with pytest.raises(ValueError, match=r"messages cannot be trained on .*prints 0 image tokens"):
        run("llava_stage1", tmp_path / "out", base, sources()["llava"], "--prompt-format", "messages")


def test_stage_2_takes_the_chat_template_when_asked_to(chatml, tmp_path):
    source = sources()["cc_sbu_align"]
    folder = run("minigpt4_stage2", tmp_path / "out", chatml, source, *OTHER_MODEL, "--prompt-format", "messages")
    assert len(curve(folder)) == 2


def test_llava_stage_2_has_the_articles_numbers():
    stage, config, _ = parse_recipe(["--config", "llava_stage2", "--bf16", "false", "--use_cpu", "true"])
    assert (config.max_steps, 8 * config.per_device_train_batch_size) == (14787, 32)
    assert 14787 == -(-157712 // 32) * 3
    assert (config.learning_rate, config.warmup_steps, config.weight_decay) == (2e-5, 0.03, 0.0)
    assert len(stage.sources) == 1 and "weight" not in stage.sources[0]  # each row is equally likely
    stage, config, _ = parse_recipe(["--config", "llava_stage1", "--bf16", "false", "--use_cpu", "true"])
    assert (config.max_steps, 8 * config.per_device_train_batch_size) == (-(-595375 // 128), 128)
    assert (config.learning_rate, config.warmup_steps, config.weight_decay) == (2e-3, 0.03, 0.0)


@pytest.mark.parametrize(
    ("name", "rate", "batch", "epochs", "prompt_format"),
    [
        ("llava_scienceqa", 2e-5, 128, 12, "llava_v0"),
        ("llava15_stage1", 1e-3, 256, 1, "llava_plain"),
        ("llava15_stage2", 2e-5, 128, 1, "llava_v1"),
    ],
)
def test_llavas_later_recipes(name, rate, batch, epochs, prompt_format):
    stage, config, _ = parse_recipe(["--config", name, "--bf16", "false", "--use_cpu", "true"])
    assert (config.learning_rate, 8 * config.per_device_train_batch_size) == (rate, batch)
    assert (config.num_train_epochs, config.max_steps, config.warmup_steps) == (epochs, -1, 0.03)
    assert (stage.prompt_format, stage.max_row_length) == (prompt_format, 2048)


@pytest.mark.parametrize(
    ("first", "second"), [("llava_stage1", "llava_stage1_plain"), ("llava_stage2", "llava_stage2_by_kind")]
)
def test_llavas_variants_change_one_thing(first, second):
    a, b = (yaml.safe_load(Path(find_recipe(name)).read_text()) for name in (first, second))
    changed = {key for key in a if a[key] != b[key]} - {"output_dir"}
    assert a.keys() == b.keys() and changed == {"prompt_format" if "plain" in second else "sources"}


def test_the_three_kinds_are_equally_likely():
    stage, _, _ = parse_recipe(["--config", "llava_stage2_by_kind", "--bf16", "false", "--use_cpu", "true"])
    assert len(stage.sources) == 3 and all(source.endswith("::weight=1") for source in stage.sources)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("llava")])
def test_llavas_headers_do_not_call_the_articles_numbers_choices(name):
    header = Path(find_recipe(name)).read_text().split("\n\n")[0]
    assert "choices" not in header and "uniformly" not in header


@pytest.mark.parametrize("name", ["minigpt4_llama2_stage1", "minigpt4_llama2_stage2"])
def test_the_authors_llama_2_has_no_qformer(name, tmp_path):
    stage, _, _ = parse_recipe(["--config", name, "--bf16", "false", "--use_cpu", "true"])
    stage.requires_stage1 = False
    check_model(stage, MiniGPT4Config(qformer_config=None), "without Q-Former")
    with pytest.raises(ValueError, match="for a model without Q-Former"):
        check_model(stage, MiniGPT4Config(), "with Q-Former")
    assert "BLIP-2's tower and Q-Former" not in Path(find_recipe(name)).read_text()


def test_a_variant_needs_its_own_base(tmp_path):
    with pytest.raises(ValueError, match="without Q-Former"):
        run("no_qformer_stage1", tmp_path, model_folder("minigpt4"), sources()["wds"])
    with pytest.raises(ValueError, match="3 linear layers"):
        run("three_layers_stage1", tmp_path, model_folder("minigpt4"), sources()["wds"])


def test_a_source_without_rows(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="lists no images"):
        run(
            "minigpt4_stage1",
            tmp_path / "out",
            model_folder("minigpt4"),
            f"llava:{tmp_path}/bad.json::images={tmp_path}/images",
        )


def test_bad_rows_are_reported_at_the_end(tmp_path, caplog):
    source = write_sources(tmp_path / "data")["cc_sbu_align"]
    (tmp_path / "data" / "cc_sbu_align" / "image" / "5.jpg").write_bytes(b"not an image")
    folder = run("minigpt4_stage1", tmp_path / "out", model_folder("minigpt4"), source, "--max_steps", "7")
    (counts,) = json.loads((folder / "run.json").read_text())["rows"].values()
    assert counts["rows"] >= 14 and counts["unreadable_image"] >= 1
    assert f"{counts['rows']} rows read, skipped: {counts['unreadable_image']} unreadable_image" in caplog.text
    assert "skipped 5 (unreadable_image)" in caplog.text


def test_the_first_loss_of_a_random_model_stops_the_run(tmp_path):
    set_seed(0)
    with pytest.raises(RuntimeError, match="guessing"):
        run("minigpt4_stage1", tmp_path, model_folder("minigpt4"), sources()["wds"], "--check_first_loss", "true")
