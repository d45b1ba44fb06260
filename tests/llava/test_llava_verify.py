"""`verify` of LLaVA: of a converted checkpoint, of transformers' own, and against damage that is planted."""

import json
import shutil

import pytest
import torch
from golden_llava import GOLDEN
from released_files import edit_tensors
from test_conversion import authors, language_model  # noqa: F401  # a fixture
from tiny_models import save_blip2, save_llava

from transformers_minigpt4.conversion.llava import convert_llava
from transformers_minigpt4.conversion.verify import verify_checkpoint


# Random weights know no language and match no captions, so these two fail for all that is tested here.
UNTAUGHT = {"language model", "captions"}


def convert(kind: str, authors, folder):  # noqa: F811
    given = {"vision": str(GOLDEN / "clip"), "projector": str(GOLDEN / kind / "mm_projector.bin")}
    return convert_llava(folder / "ours", language_model=language_model(authors, folder / "language"), **given)


@pytest.fixture(scope="module")
def converted(authors, tmp_path_factory):  # noqa: F811
    return convert("linear", authors, tmp_path_factory.mktemp("converted"))


def checked(folder) -> dict:
    return {check.name: check for check in verify_checkpoint(folder).checks}


def failed(folder) -> set[str]:
    return {name for name, check in checked(folder).items() if check.status == "fail"} - UNTAUGHT


def edited(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "copy")


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_what_convert_writes_is_right(kind, authors, tmp_path):  # noqa: F811
    checks = checked(convert(kind, authors, tmp_path))
    assert {name for name, check in checks.items() if check.status == "fail"} <= UNTAUGHT
    assert checks["recorded weights"].status == "ok" and "as recorded" in checks["tower's features"].detail
    assert "llava_v1, as its authors write it" in checks["chat template"].detail
    assert checks["image features"].status == "ok" and "captions" in checks


def test_a_fresh_projector_is_not_asked_what_it_sees(authors, tmp_path):  # noqa: F811
    base = language_model(authors, tmp_path / "language")
    folder = convert_llava(tmp_path / "ours", language_model=base, vision=str(GOLDEN / "clip"))
    check = checked(folder)["captions"]
    assert check.status == "skip" and "projector is untrained" in check.detail
    edited(folder, vision_feature_layer=-1)  # the article's ablation
    assert checked(folder)["tower's features"].status == "warn"


def test_transformers_own(tmp_path):
    save_llava(tmp_path)
    checks = checked(tmp_path)
    assert {name for name, check in checks.items() if check.status == "fail"} <= UNTAUGHT
    assert "template of its own" in checks["chat template"].detail and checks["recorded weights"].status == "skip"
    tokens = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({**tokens, "vision_feature_select_strategy": "full"}))
    assert "the processor gives 17 per image, the model 16" in checked(tmp_path)["vocabulary"].detail


def zero_projector(tensors):
    for name in tensors:
        if "multi_modal_projector" in name:
            tensors[name].zero_()


def swapped_layers(tensors):
    first, second = (f"model.language_model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()


def rolled_tower(tensors):
    name = "model.vision_tower.embeddings.patch_embedding.weight"
    tensors[name] = tensors[name].roll(1, dims=0)


def other_projector(tensors):
    draw = torch.Generator().manual_seed(3)
    for name in tensors:
        if "multi_modal_projector" in name and name.endswith("weight"):
            tensors[name] = torch.randn(tensors[name].shape, generator=draw) * tensors[name].std()


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (zero_projector, "projector"),
        (other_projector, "projector"),
        (swapped_layers, "language model"),
        (rolled_tower, "vision tower"),
    ],
)
def test_damaged_tensors_are_named(copy, damage, part):
    edit_tensors(copy / "model.safetensors", damage)
    check = checked(copy)["recorded weights"]
    assert check.status == "fail" and f"{part}: " in check.detail
    if damage is zero_projector:
        (copy / "minigpt4_weights.json").unlink()
        assert failed(copy) >= {"finite weights", "image features"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -1}, "vision_feature_layer is -1, not -2"),
        ({"vision_feature_layer": 40}, "layer 40 of a tower that has"),
    ],
)
def test_a_wrong_layer_of_the_tower(copy, change, message):
    edited(copy, **change)
    check = checked(copy)["tower's features"]
    assert check.status == "fail" and message in check.detail


def test_lost_tensors_and_other_models_are_refused_in_one_line(copy, tmp_path):
    edit_tensors(copy / "model.safetensors", lambda tensors: tensors.pop("model.language_model.norm.weight"))
    (check,) = [check for check in verify_checkpoint(copy).checks if check.name == "loading"]
    assert check.detail == "1 tensors are missing: model.language_model.norm.weight"
    save_blip2(tmp_path / "blip2")
    (check,) = verify_checkpoint(tmp_path / "blip2").checks
    assert "is a 'blip-2'; MiniGPT-4 and LLaVA can be verified" in check.detail
