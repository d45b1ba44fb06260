"""The demo of LLaVA from end to end, with few steps; the full run is slow."""

import io
import json
import random

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor, Blip2VisionModel

from transformers_minigpt4.demo.llava import STATES, measure, run_llava
from transformers_minigpt4.demo.llava_data import ALL, ask_about
from transformers_minigpt4.demo.llava_model import build_llava
from transformers_minigpt4.demo.run import BASE, held_out
from transformers_minigpt4.demo.scoring import is_well_formed, right_attributes
from transformers_minigpt4.demo.world import held_out_scenes, is_held_out
from transformers_minigpt4.demo.writer import read_scene
from transformers_minigpt4.instruct.prompts import KINDS
from transformers_minigpt4.modeling.modeling_llava import LlavaLinearForConditionalGeneration


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    screen = io.StringIO()
    results = run_llava(
        folder,
        ablations=["no_stage1"],
        training_images=6,
        stage_1_steps=2,
        stage_2_steps=2,
        held_out_images=2,
        console=Console(file=screen, width=140),
    )
    return folder, results, screen.getvalue()


def test_files_and_screen(finished):
    folder, results, screen = finished
    written = json.loads((folder / "results.json").read_text())
    answers = written.pop("answers")
    assert written == json.loads(json.dumps(results))
    assert list(answers) == list(results["shares"]) == list(STATES)
    for state, records in answers.items():
        assert len(records) == 2 * len(KINDS)
        right = [all(record["named"].values()) for record in records]
        assert results["shares"][state][ALL] == pytest.approx(sum(right) / len(right))
    assert results["rows"] == dict.fromkeys(KINDS, 6) and list(results["ablations"]) == ["no_stage1"]
    for text in ("LLaVA, stage 1: step 2/2", "no stage 1, stage 2: step 2/2", "ablations, after stage 2", "reasoning"):
        assert text in screen


def _weights(folder):
    return LlavaLinearForConditionalGeneration.from_pretrained(folder).state_dict()


def test_each_stage_changes_its_modules_alone(finished):
    folder, _, _ = finished
    others = folder / "ablations" / "no_stage1"
    start, first, second, without = (
        build_llava()[0].state_dict(),
        *(_weights(path) for path in (folder / "stage1", folder / "checkpoint", others / "checkpoint")),
    )
    changed = {name for name in start if not torch.equal(start[name], first[name])}
    assert changed == {f"model.multi_modal_projector.{part}" for part in ("weight", "bias")}
    for before, after in ((first, second), (start, without)):
        changed = {
            name.removeprefix("model.").split(".")[0] for name in start if not torch.equal(before[name], after[name])
        }
        assert changed == {"multi_modal_projector", "language_model", "lm_head"}
    assert not (others / "stage1").exists()


def test_no_held_out_combination_is_trained(finished):
    lines = (finished[0] / "data" / "scenes" / "scenes.jsonl").read_text().splitlines()
    for line in lines:
        scene = read_scene("\n".join(json.loads(line)["captions"]))
        assert scene is not None and not is_held_out(scene)


def test_checkpoint_loads_and_answers_as_it_was_measured(finished):
    folder, _, _ = finished
    model = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint")
    processor = AutoProcessor.from_pretrained(folder / "checkpoint")
    written = json.loads((folder / "results.json").read_text())
    assert measure(model, processor, *held_out(0, 2), 0) == written["answers"][STATES[-1]]


def test_the_tower_is_the_demos():
    """Of the layer before the last, without the class token."""
    model, processor = build_llava()
    _, images = held_out(0, 2)
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    tower = Blip2VisionModel.from_pretrained(BASE / "vision_tower", dtype=torch.float32)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        found = torch.stack(list(model.get_image_features(pixels).pooler_output))
        torch.testing.assert_close(found, model.model.multi_modal_projector(expected))


def test_the_stand_ins_own_answers_are_right():
    for scene in held_out_scenes():
        for question in ask_about(scene, random.Random(0)):
            assert is_well_formed(question.reference, ended=True)
            assert sum(right_attributes(question.reference, scene).values()) >= 1
    assert not is_well_formed("It is red.", ended=False) and not is_well_formed("It is", ended=True)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="no ablation no_stage2"):
        run_llava(tmp_path, ablations=["no_stage2"])
    with pytest.raises(ValueError, match="at least 1"):
        run_llava(tmp_path, stage_1_steps=0)
    mine = tmp_path / "data" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match="is not of an earlier run"):
        run_llava(tmp_path)
    assert mine.read_text() == "mine"


@pytest.mark.slow
def test_the_full_run_learns(tmp_path):
    shares = run_llava(tmp_path, console=Console(file=io.StringIO()))["shares"]
    before, stage_1, stage_2 = (shares[state]["attributes"] for state in STATES)
    assert stage_2 > stage_1 + 0.2 and stage_2 > before + 0.3
    assert shares[STATES[-1]]["well-formed"] > 0.9
