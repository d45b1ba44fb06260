"""Presets fill in the released parts by name, and what is given explicitly replaces them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from golden_model import ALPHA
from hub_server import Blob, HubServer
from released_files import ORIGINAL, save_blip2
from safetensors.torch import load_file

from transformers_minigpt4.conversion.commands import PresetName
from transformers_minigpt4.conversion.convert import convert_checkpoint
from transformers_minigpt4.conversion.presets import LLAVA_PRESETS, PRESETS, PROJECTORS, fill_in
from transformers_minigpt4.training.recipe_files import find_recipe, recipe_names


def test_the_command_offers_every_preset():
    assert get_args(PresetName) == (*PRESETS, *LLAVA_PRESETS)


def test_recipes_and_presets_name_the_same_bases():
    bases = set()
    for name in recipe_names():
        path = yaml.safe_load(Path(find_recipe(name)).read_text(encoding="utf-8"))["model_name_or_path"]
        bases |= set(re.findall(r"^minigpt4-(.*-base)$", path))
    assert bases == {name for name in PRESETS if name.endswith("-base")}


def test_a_preset_from_the_hub(golden, tmp_path):
    """`vicuna-7b` with tiny parts under the names of the real ones: the same bits as with every option given."""
    save_blip2(golden, tmp_path / "blip2")
    shutil.copyfile(ORIGINAL["projector"], tmp_path / "pretrained_minigpt4_7b.pth")
    with HubServer() as hub:
        for name, folder in (
            (PRESETS["vicuna-7b"].vision, tmp_path / "blip2"),
            (PRESETS["vicuna-7b"].language_model, ALPHA / "llm"),
        ):
            files = {path.name: Blob(path.read_bytes(), path.suffix == ".safetensors") for path in folder.iterdir()}
            hub.commit(hub.create("models", name), "main", files, "weights")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "transformers_minigpt4.cli", "convert", "--preset", "vicuna-7b"]
        done = subprocess.run(
            [*command, "--output", "out"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    expected = convert_checkpoint(tmp_path / "expected", dtype="float16", **ORIGINAL)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", expected))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_given_replaces_the_presets_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"vision": "eva_vit_g.pth", "projector": "fresh", "projector_layers": 3, "dtype": "auto"}
    options = fill_in("vicuna-13b", given)
    assert options == {
        **given,
        "qformer": "Salesforce/blip2-flan-t5-xxl",
        "language_model": "Vision-CAIR/vicuna",
        "chat_template": "vicuna_v0",
    }
    assert fill_in(None, {"vision": "a", "language_model": "b"}) == {"vision": "a", "language_model": "b"}
    assert fill_in("llama2-7b-base", {})["qformer"] == "none"


@pytest.mark.parametrize(
    "preset,given,message",
    [
        (None, {}, "give --vision and --language-model, or --preset"),
        (None, {"vision": "a"}, "give --language-model, or"),
        ("vicuna-7b", {}, r"pretrained_minigpt4_7b\.pth, which is not in this folder; download it from https://"),
        (
            "vicuna-7b",
            {"delta": "d", "projector": "fresh"},
            "merged language model, Vision-CAIR",
        ),
    ],
)
def test_what_a_preset_cannot_fill_in(tmp_path, monkeypatch, preset, given, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        fill_in(preset, given)


def test_every_projector_is_somebodys():
    named = {preset.projector for preset in PRESETS.values()} - {"fresh"}
    assert named == PROJECTORS.keys()
