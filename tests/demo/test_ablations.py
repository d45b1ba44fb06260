"""The paper's variants on the toy world, with a few steps."""

import io
import json

import pytest
from rich.console import Console
from safetensors.torch import load_file
from torch import equal

from transformers_minigpt4.demo.ablations import VARIANTS, run_ablations, train_variants
from transformers_minigpt4.demo.run import build_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    screen = io.StringIO()
    rows = run_ablations(folder, steps=4, held_out_images=6, console=Console(file=screen, width=140))
    return folder, rows, screen.getvalue()


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_changes_its_own_parts_alone(finished, name):
    start, _ = build_model(**VARIANTS[name].model)
    changed = set()
    for checkpoint in ("stage1", "checkpoint"):
        saved = load_file(finished[0] / "ablations" / name / checkpoint / "model.safetensors")
        assert saved.keys() == start.state_dict().keys()
        changed |= {key.split(".")[1] for key, value in start.state_dict().items() if not equal(value, saved[key])}
    expected = {"multi_modal_projector"}
    if name == "tune_qformer":
        expected |= {"qformer", "query_tokens"}
    assert changed == expected


def test_variants_are_what_they_say():
    without, processor = build_model(**VARIANTS["no_qformer"].model)
    assert without.model.qformer is None and processor.image_seq_length == 64 // 4
    three, _ = build_model(**VARIANTS["three_layers"].model)
    assert sum("multi_modal_projector" in name and name.endswith("weight") for name in three.state_dict()) == 3


def test_table_and_file(finished):
    folder, rows, screen = finished
    assert list(rows) == list(VARIANTS)
    assert json.loads((folder / "ablations.json").read_text())["variants"] == rows
    for variant in VARIANTS.values():
        assert variant.title in screen
    assert "say nothing about the paper's" in screen


def test_a_finished_variant_is_not_trained_again(finished):
    folder = finished[0] / "ablations"
    screen = io.StringIO()
    weights = folder / "three_layers" / "checkpoint" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    made = train_variants(folder, 0, 4, ["three_layers"], Console(file=screen, width=200))
    assert "trained already" in screen.getvalue() and weights.stat().st_mtime_ns == written
    assert made["three_layers"]["checkpoint"] == weights.parent
    train_variants(folder, 1, 4, ["three_layers"], Console(file=screen))
    assert weights.stat().st_mtime_ns != written


def test_impossible_variants(tmp_path):
    with pytest.raises(ValueError, match="no variant four_layers"):
        train_variants(tmp_path, variants=["four_layers"])
    with pytest.raises(ValueError, match="at least one"):
        train_variants(tmp_path, steps=0)
