"""Cached features and packed rows through recipes train as these do without; what does not fit is refused."""

import json
import shutil
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_sources
from training_runs import SMALL, curve, model_folder, run, sources, weights
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from transformers_minigpt4.cli import app
from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.training.collator import ImageTextCollator
from transformers_minigpt4.training.feature_building import build_features
from transformers_minigpt4.training.loading import load_model, load_rows
from transformers_minigpt4.training.packing import count_tokens, pack
from transformers_minigpt4.training.recipe import parse_recipe


STEPS = ("--max_steps", "3", "--save_steps", "3", "--learning_rate", "1e-2", "--warmup_steps", "1")


def arguments(recipe, folder, model, source, *more):
    named = ["--config", recipe, *SMALL, "--output_dir", str(folder), "--model_name_or_path", str(model)]
    return [*named, "--sources", source, *more]


def build(recipe, cache, model, source, *more):
    given = arguments(recipe, cache.parent / "unused", model, source, "--feature_cache", str(cache), *more)
    return build_features(*parse_recipe(given))


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Features of the tiny MiniGPT-4, whose images all its sources share."""
    cache = tmp_path_factory.mktemp("features") / "cache"
    counts = build("minigpt4_stage1", cache, model_folder("minigpt4"), sources()["wds"])
    assert counts == {"encoded": 30, "present": 0, "broken": 0}
    return cache


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run that all others must equal."""
    return run("minigpt4_stage1", tmp_path_factory.mktemp("plain"), model_folder("minigpt4"), sources()["wds"], *STEPS)


def check_equal(folder, plain, tolerance):
    assert curve(folder) == pytest.approx(curve(plain), abs=tolerance) and len(curve(plain)) == 3
    found, wanted, start = weights(folder), weights(plain), load_file(model_folder("minigpt4") / "model.safetensors")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0)
        assert (value - start[name]).abs().max() > 5 * tolerance


@pytest.mark.parametrize("more", [(), ("--pack_tokens", "90")])
def test_packed_rows_train_as_padded_ones(plain, tmp_path, more):
    options = (*STEPS, "--pack_rows", "true", *more)
    folder = run("minigpt4_stage1", tmp_path, model_folder("minigpt4"), sources()["wds"], *options)
    check_equal(folder, plain, 1e-5)
    shares = [json.loads(line)["non_padding_fraction"] for line in (folder / "loss.jsonl").read_text().splitlines()]
    padded = [json.loads(line)["non_padding_fraction"] for line in (plain / "loss.jsonl").read_text().splitlines()]
    assert min(shares) > max(padded) and (more or shares == [1.0] * 3)


def test_cached_features_train_as_the_tower_does(cached, plain, tmp_path):
    """To the eight bits of bf16; and stage 2 continues from there with the same cache, which its base fits."""
    options = (*STEPS, "--feature_cache", str(cached), "--dataloader_num_workers", "1")
    folder = run("minigpt4_stage1", tmp_path / "1", model_folder("minigpt4"), sources()["wds"], *options)
    check_equal(folder, plain, 1e-3)
    assert curve(folder) != curve(plain)
    more = (*STEPS, "--feature_cache", str(cached), "--pack_rows", "true")
    second = run("minigpt4_stage2", tmp_path / "2", folder, sources()["cc_sbu_align"], *more)
    loaded = AutoModelForImageTextToText.from_pretrained(second)  # its record leads to the tower
    assert sum(p.numel() for p in loaded.model.vision_tower.parameters()) > 0


def test_the_tower_is_not_loaded(cached):
    given = arguments("minigpt4_stage1", "unused", model_folder("minigpt4"), sources()["wds"])
    model, _ = load_model(*parse_recipe([*given, "--feature_cache", str(cached)]))
    whole, _ = load_model(*parse_recipe(given))
    assert type(model) is type(whole)
    names = {name for name, _ in whole.named_parameters() if ".vision_tower." in name or ".qformer." in name}
    found, wanted = dict(model.named_parameters()), dict(whole.named_parameters())
    assert names and found.keys() == wanted.keys() - names
    assert all(torch.equal(value, wanted[name]) and value.device.type == "cpu" for name, value in found.items())


@pytest.mark.parametrize("recipe", ["llava_stage1", "llava_stage2"])
def test_llava_gets_its_tower_back(recipe, tmp_path):
    base, source = model_folder("llava"), sources()["llava"]
    counts = build(recipe, tmp_path / "cache", base, source)
    assert counts["encoded"] == 30
    out = run(
        recipe, tmp_path / "out", base, source, "--feature_cache", str(tmp_path / "cache"), "--pack_rows", "true"
    )
    saved, start = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (out, base))
    assert saved.keys() == start.keys()
    moved = {name.split(".")[1] for name, value in saved.items() if not torch.equal(value, start[name])}
    wanted = {"multi_modal_projector"} | ({"language_model", "weight"} if recipe == "llava_stage2" else set())
    assert moved == wanted


def test_adapters_train_from_features(cached, tmp_path):
    more = ("--feature_cache", str(cached), "--pack_rows", "true", "--use_peft", "true", "--lora_r", "2")
    more += ("--lora_target_modules", "q_proj", "--trainable_modules", "projector", "lora")
    folder = run("minigpt4_stage1", tmp_path, model_folder("minigpt4"), sources()["wds"], *more)
    assert any("lora_B" in name and value.any() for name, value in weights(folder).items())


# What does not fit


@pytest.mark.parametrize("change", ["weights", "dtype"])
def test_a_cache_of_another_model_is_refused(change, cached, tmp_path):
    base, more = model_folder("minigpt4"), ()
    if change == "weights":
        base = shutil.copytree(base, tmp_path / "other")
        state = load_file(base / "model.safetensors")
        state["model.vision_tower.encoder.layers.0.mlp.fc1.bias"][-1] += 1e-3
        save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    else:
        more = ("--dtype", "bfloat16")
    options = (*more, "--feature_cache", str(cached))
    with pytest.raises(DataError, match="built with other frozen weights, another dtype"):
        run("minigpt4_stage1", tmp_path / "out", base, sources()["wds"], *options)
    with pytest.raises(DataError, match="Build them in another folder"):
        build("minigpt4_stage1", cached, base, sources()["wds"], *more)


def test_a_copy_of_the_model_only_has_to_be_shown_once(cached, tmp_path):
    """Names of tensors in files may differ between copies of one model; the weights in memory then decide."""
    cache = shutil.copytree(cached, tmp_path / "cache")
    index = json.loads((cache / "features.json").read_text())
    (cache / "features.json").write_text(json.dumps({**index, "sources": []}))
    given = ("minigpt4_stage1", tmp_path / "out", model_folder("minigpt4"), sources()["wds"])
    with pytest.raises(DataError, match="from another copy of its model"):
        run(*given, "--feature_cache", str(cache))
    assert build("minigpt4_stage1", cache, *given[2:]) == {"encoded": 0, "present": 30, "broken": 0}
    run(*given, "--feature_cache", str(cache))


def test_images_missing_from_the_cache(cached, tmp_path):
    """A new one stops the run; a broken one is skipped, as it is without a cache."""
    source = write_sources(tmp_path, 32)["cc_sbu_align"]
    (tmp_path / "cc_sbu_align" / "image" / "3.jpg").write_bytes(b"not an image")
    model = model_folder("minigpt4")

    def read(cache):
        given = arguments("minigpt4_stage1", tmp_path / "out", model, source, "--feature_cache", str(cache))
        rows = load_rows(*parse_recipe(given)[:2]).dataset
        return [row["key"] for row in islice(rows, 62)]  # two epochs

    with pytest.raises(DataError, match=r"no features of .*3[01]\.jpg .*adds the missing ones"):
        read(cached)
    cache = shutil.copytree(cached, tmp_path / "cache")
    assert build("minigpt4_stage1", cache, model, source) == {"encoded": 2, "present": 29, "broken": 1}
    assert set(read(cache)) == {str(number) for number in range(32)} - {"3"}


def test_features_need_a_folder(tmp_path):
    given = ("minigpt4_stage1", tmp_path, model_folder("minigpt4"), sources()["wds"])
    with pytest.raises(ValueError, match="--feature-cache FOLDER"):
        build_features(*parse_recipe(arguments(*given)))
    with pytest.raises(DataError, match="not a feature cache"):
        run(*given, "--feature_cache", str(tmp_path))


def minigpt4(*words):
    return CliRunner().invoke(app, list(words))


def test_the_commands(tmp_path):
    """Features and training of `tiny` on the command line."""
    more = ["tiny", *SMALL, "--output_dir", str(tmp_path / "out"), "--feature_cache", str(tmp_path / "cache")]
    for said in (
        "4 images encoded, 0 already cached, 0 unreadable",
        "0 images encoded, 4 already cached, 0 unreadable",
    ):
        done = minigpt4("features", *more)
        assert done.exit_code == 0 and said in done.stderr, done.output
    done = minigpt4("train", *more)
    assert done.exit_code == 0 and len(curve(tmp_path / "out")) == 2, done.output
    again = minigpt4("train", *more)
    assert again.exit_code == 0 and "complete: " in again.stdout and len(curve(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("words", "said", "status"),
    [
        (["minigpt5_stage9"], "There is no recipe minigpt5_stage9", 2),
        (["tiny", "--learning_rat", "1"], "learning_rat", 2),
        (["tiny", "--pack_tokens", "9"], "pack_tokens=9 with pack_rows=False", 2),
        (["tiny", "--feature_cache", "nowhere"], "nowhere is not a feature cache", 1),
    ],
)
def test_a_bad_command_line_is_one_line(words, said, status, tmp_path):
    done = minigpt4("train", *words, "--output_dir", str(tmp_path))
    assert done.exit_code == status and said in done.stderr
    assert done.stderr.startswith("minigpt4: ") and done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize("max_tokens", [None, 1, 90])
def test_rows_and_positions_are_counted(model, processor, pictures, max_tokens):
    rows = [
        {"images": pictures[:1], "prompt": "<ImageHere>", "completion": "A teacher near the river.###"},
        {"images": [], "prompt": "Hi: ", "completion": "Hello.###"},
        {"images": pictures[1:], "prompt": "<ImageHere><ImageHere>", "completion": "One is red.###"},
    ]
    collator = ImageTextCollator(processor)
    batch = collator(rows)
    real = int(batch["attention_mask"].sum())
    assert count_tokens(batch) == (3, real, batch["input_ids"].numel())
    packed = pack(model, collator, max_tokens)(rows)
    assert count_tokens(packed) == (3, real, packed["input_ids"].numel())
    assert max_tokens is not None or packed["input_ids"].numel() == real
