"""`verify` against damage that is planted: with a record, in the sources, and with neither; and no false alarms."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from corruptions import FOLDER_CORRUPTIONS, STATE_CORRUPTIONS, reordered_layers, roles, swapped
from demo_parts import BASE, save_demo_blip2
from peft import LoraConfig, get_peft_model
from released_files import edit_tensors, save_tower
from safetensors.torch import load_file

from transformers_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from transformers_minigpt4.conversion import verify_weights
from transformers_minigpt4.conversion.convert import convert_checkpoint
from transformers_minigpt4.conversion.key_maps import PROJECTOR, TOWER
from transformers_minigpt4.conversion.merge import merge_checkpoint
from transformers_minigpt4.conversion.verify import verify_checkpoint
from transformers_minigpt4.conversion.verify_captions import EMOJI, SHAPES, bundled, check_captions, match, own_images
from transformers_minigpt4.conversion.verify_weights import check_finite, check_pixels, check_record, check_trained
from transformers_minigpt4.conversion.weight_record import (
    WeightRecord,
    deviations,
    known_sources,
    load_record,
    sample_all,
)


# What neither the spectrum, nor the biases, nor captions show on the demo's checkpoint without any record: the answers
# stay as good as they were. The norm in the language model undoes the scale, that in the Q-Former that of the queries;
# the last two layers of this tower can be exchanged. Some more that leave
# three quarters of the captions in the first place are named in docs/guides/convert.md.
UNSEEN_WITHOUT_RECORD = {
    "tower: neighboring layers swapped",
    "queries: x10",
    "queries: shuffled",
    "projector: x10",
}
SELECTED = sorted(
    {
        *("tower: all random", "tower: all fresh", "tower: one layer random", "tower: layers reversed"),
        *("tower: k q v", "tower: v k q", "tower: norms of one", "tower: biases dropped", "tower: rows shuffled"),
        *("tower: patch embedding random", "tower: attention transposed", "qformer: all random", "qformer: k q v"),
        *(
            "qformer: one layer random",
            "qformer: layers reversed",
            "qformer: rows shuffled",
            "qformer: biases dropped",
        ),
        *("queries: zero", "queries: all alike", "projector: random", "projector: rows shuffled"),
        *("projector: columns shuffled", "projector: read transposed", "projector: bias dropped"),
        *UNSEEN_WITHOUT_RECORD,
    }
)


@pytest.fixture(scope="module")
def demo(demo_run) -> Path:
    return demo_run / "checkpoint"


@pytest.fixture(scope="module")
def state(demo) -> dict[str, torch.Tensor]:
    return load_file(demo / "model.safetensors")


@pytest.fixture(scope="module")
def loaded(demo):
    return MiniGPT4ForConditionalGeneration.from_pretrained(demo).eval(), MiniGPT4Processor.from_pretrained(demo)


@pytest.fixture(scope="module")
def blip2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip2") / "blip2"
    save_demo_blip2(folder)
    return folder


def base(folder: Path, vision: Path, **options) -> Path:
    return convert_checkpoint(folder, vision=str(vision), language_model=str(BASE / "language_model"), **options)


def planted(state, name: str) -> dict[str, torch.Tensor]:
    changed = dict(state)
    STATE_CORRUPTIONS[name](changed)
    return changed


def failed(report) -> set[str]:
    return {check.name for check in report.checks if check.status == "fail"}


# Damage


def test_the_sources_that_ship_are_those_on_record(state):
    (record,) = known_sources().values()
    assert record.values.keys() == {name for name in state if not name.startswith(PROJECTOR)}
    assert max(deviations(record, state).values()) < 1e-5


def test_damage_to_a_recorded_checkpoint(demo, state):
    """Not one of the planted ones goes unnoticed, down to a scale that the next norm undoes."""
    records = [load_record(demo / "minigpt4_weights.json")]
    assert check_record(records, state).status == "ok"
    missed = [name for name in STATE_CORRUPTIONS if check_record(records, planted(state, name)).status != "fail"]
    assert not missed, missed


def test_damage_to_a_source_before_it_was_converted(state):
    """The record then agrees; the parts that this package ships are compared with what they should be."""
    missed = []
    for name in STATE_CORRUPTIONS:
        changed = planted(state, name)
        if check_record([WeightRecord(sample_all(changed))], changed).status != "fail":
            missed.append(name)
    assert {name.split(":")[0] for name in missed} == {"projector"}, missed


def test_damage_without_any_record(loaded, state, monkeypatch):
    """What trained weights look like, and what only the right ones do: captions fit their own images."""
    monkeypatch.setattr(verify_weights, "known_sources", dict)
    model, processor = loaded
    config, missed = model.config, set()
    with torch.inference_mode():
        for name in SELECTED:
            changed = planted(state, name)
            checks = [check_trained(changed, config, [], set())]
            if checks[0].status != "fail":
                model.load_state_dict(changed)
                checks += [check_finite(model), check_captions(model, processor, knows_only_shapes=True)]
            if not any(check.status == "fail" for check in checks):
                missed.add(name)
        model.load_state_dict(state)
    assert missed == UNSEEN_WITHOUT_RECORD, missed


def test_a_trained_projector_that_was_reset_is_not_taken_for_a_new_one(demo, tmp_path):
    """Saved again, so that the record of weights is gone; the config still says that it was trained."""
    model = MiniGPT4ForConditionalGeneration.from_pretrained(demo)
    torch.manual_seed(0)
    for module in model.model.multi_modal_projector.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    model.save_pretrained(tmp_path)
    MiniGPT4Processor.from_pretrained(demo).save_pretrained(tmp_path)
    assert not (tmp_path / "minigpt4_weights.json").exists()
    assert "captions" in failed(verify_checkpoint(tmp_path))


@pytest.mark.parametrize("name", FOLDER_CORRUPTIONS)
def test_damage_to_configs(demo, tmp_path, name):
    """Without the record: that of a tower of BLIP-2's kind is known."""
    folder = Path(shutil.copytree(demo, tmp_path / "checkpoint"))
    (folder / "minigpt4_weights.json").unlink()
    FOLDER_CORRUPTIONS[name](folder)
    assert failed(verify_checkpoint(folder)) & {"image processor", "recorded weights"}


@pytest.mark.parametrize(
    "change", [reordered_layers("tower", swapped(1, 2)), roles("tower", "kqv")], ids=["swapped layers", "k q v"]
)
def test_a_damaged_source_from_end_to_end(blip2, tmp_path, change):
    source = Path(shutil.copytree(blip2, tmp_path / "source"))

    def spoil(tensors):
        names = {name: name.replace("vision_model.", TOWER, 1) for name in tensors if name.startswith("vision_model.")}
        tower = {target: tensors[name] for name, target in names.items()}
        change(tower)
        tensors.update({name: tower[target] for name, target in names.items()})

    edit_tensors(source / "model.safetensors", spoil)
    assert failed(verify_checkpoint(base(tmp_path / "base", source))) >= {"recorded weights"}


def test_a_layernorm_that_was_never_loaded(blip2, tmp_path):
    """The authors' `ln_vision` is trained with the Q-Former; a new one in its place changes every feature."""
    folder = base(tmp_path / "base", blip2)

    def reset(tensors):
        tensors[TOWER + "post_layernorm.weight"].fill_(1)
        tensors[TOWER + "post_layernorm.bias"].zero_()

    edit_tensors(folder / "model.safetensors", reset)
    (folder / "minigpt4_weights.json").unlink()
    checks = {check.name: check for check in verify_checkpoint(folder).checks}
    assert "not the ln_vision" in checks["trained weights"].detail


# No false alarms


def test_the_demos_checkpoints(demo_run):
    """Its language model knows no English, and says so."""
    for stage in ("stage1", "checkpoint"):
        report = verify_checkpoint(demo_run / stage)
        assert all(check.status == "ok" for check in report.checks), report
        assert "shapes: own caption first for 1" in str(report) and "all that it knows" in str(report)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "fresh qformer", "no qformer", "siglip", "saved again"])
def test_good_bases(kind, blip2, tmp_path):
    options: dict = {"dtype": kind} if "float" in kind else {}
    vision = blip2
    if kind == "siglip":
        save_tower("siglip", vision := tmp_path / "tower")
    elif kind == "no qformer":
        options = {"qformer": "none", "chat_template": "llama_2"}
    elif kind == "fresh qformer":
        changes = {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
        options = {"qformer": "fresh", "qformer_config": changes}
    folder = base(tmp_path / "base", vision, **options)
    if kind == "saved again":  # without the record
        MiniGPT4ForConditionalGeneration.from_pretrained(folder).bfloat16().save_pretrained(tmp_path / "again")
        MiniGPT4Processor.from_pretrained(folder).save_pretrained(tmp_path / "again")
        folder = tmp_path / "again"
    report = verify_checkpoint(folder)
    assert report.ok, report
    statuses = {check.name: check.status for check in report.checks}
    assert statuses["captions"] == "skip" and "projector is untrained" in str(report)


def test_adapters(demo, tmp_path):
    """A LoRA folder is checked with its base; merged, it has its own record."""
    tuned = get_peft_model(
        MiniGPT4ForConditionalGeneration.from_pretrained(demo),
        LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False),
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.05)
    tuned.save_pretrained(tmp_path / "lora")
    assert verify_checkpoint(tmp_path / "lora").ok
    merge_checkpoint(tmp_path / "lora", tmp_path / "merged")
    report = verify_checkpoint(tmp_path / "merged")
    assert report.ok and "language model" in str(report), report


def test_training_a_part_further_is_no_damage(demo, state):
    """The Q-Former of the paper's variant (c): every matrix moves, none is replaced."""
    records = [load_record(demo / "minigpt4_weights.json")]
    draw = torch.Generator().manual_seed(0)

    def moved(tensor):
        return tensor + 0.2 * tensor.float().std(unbiased=False) * torch.randn(tensor.shape, generator=draw)

    trained = {name: moved(tensor) if "qformer" in name else tensor for name, tensor in state.items()}
    check = check_record(records, trained)
    assert check.status == "warn" and check.detail.startswith("Q-Former: ")


# The parts of the measure


def test_chance_rarely_matches_captions():
    draw = torch.Generator().manual_seed(0)
    values = [match(torch.randn(12, 12, generator=draw)).p for _ in range(300)]
    assert sum(p < 0.05 for p in values) < 300 * 0.09
    good = match(torch.randn(12, 12, generator=draw) - 6 * torch.eye(12))
    assert good.p == 1e-4 and good.right == 12 and good.margin == pytest.approx(6, abs=1)


def test_bundled_images_are_few_and_small():
    folder = Path(verify_weights.__file__).with_name("captioned_images")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_000_000
    assert len(bundled(EMOJI)) == len(bundled(SHAPES)) == 16
    assert "Copyright (c) Microsoft" in (folder / "LICENSE.md").read_text()


def test_own_images(demo, tmp_path):
    rows = bundled(SHAPES)[:8]
    for number, row in enumerate(rows):
        row.image.save(tmp_path / f"{number}.png")
    records = [{"file_name": f"{number}.png", "caption": row.caption} for number, row in enumerate(rows)]

    def write(records):
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    write(records)
    check = verify_checkpoint(demo, images=tmp_path).checks[-1]
    assert check.status == "ok" and check.detail.startswith("own images: own caption first for ")
    wrong = [{**record, "caption": rows[number - 3].caption} for number, record in enumerate(records)]
    write(wrong)
    assert verify_checkpoint(demo, images=tmp_path).checks[-1].status == "fail"
    write(records[:3])
    with pytest.raises(ValueError, match="3 captioned images; 6 or more"):
        own_images(str(tmp_path))


def test_a_damaged_record_is_named(demo, tmp_path):
    folder = Path(shutil.copytree(demo, tmp_path / "checkpoint"))
    (folder / "minigpt4_weights.json").write_text("[]")
    check = verify_checkpoint(folder).checks[-1]
    assert check.name == "loading" and "minigpt4_weights.json is damaged" in check.detail


def test_image_processors_of_other_towers(loaded):
    model, processor = loaded
    assert check_pixels(model.config, processor, []).status == "ok"
    record = WeightRecord({}, pixels={"image_mean": [0.5, 0.5, 0.5]})
    assert check_pixels(model.config, processor, [record]).status == "fail"
