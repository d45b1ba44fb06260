"""Cards: valid metadata, facts of the records and nothing beside them, licenses derived or asked for."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump

from transformers_minigpt4.hub.cards import License, derive_license
from transformers_minigpt4.hub.publish import prepare
from transformers_minigpt4.hub.records import read_sources
from transformers_minigpt4.training.recipe import parse_recipe
from transformers_minigpt4.training.run_info import changed_settings, recipe_settings


REPO = "somebody/tiny-minigpt4"
SOURCES = {
    "sources": [
        {"part": "vision tower, Q-Former", "id": "Salesforce/blip2-flan-t5-xxl", "revision": "a1b2", "license": "mit"},
        {"part": "language model", "id": "lmsys/vicuna-7b-v1.5", "revision": "c3d4", "license": "llama2"},
        {
            "part": "projector",
            "id": "/home/somebody/pretrained_minigpt4.pth",
            "sha256": "e5f6",
            "license": "bsd-3-clause",
        },
    ]
}
RUN = {
    "stage": 2,
    "seed": 42,
    "recipe": {"learning_rate": 3e-05, "max_steps": 400, "prompts": "a | b\nc"},
    "datasets": [{"id": "somebody/cc_sbu_align", "revision": "f00d", "rows": 3439}, "/data/mine"],
    "loss": {"first": 2.5, "last": 1.25},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}
RESULTS = {
    "tasks": {
        "gqa": {
            "dataset": "lmms-lab/GQA",
            "split": "testdev",
            "metrics": {"other": 0.5, "accuracy": 0.322},
            "primary": "accuracy",
            "intervals": {"accuracy": [0.31, 0.334]},
            "samples": 12578,
        }
    }
}


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def card(checkpoint: Path, scratch: Path, license: License | None = License("mit"), **records) -> ModelCard:  # noqa: B008
    for name, record in records.items():
        (checkpoint / f"{name}.json").write_text(json.dumps(record))
    return ModelCard(prepare(checkpoint, REPO, scratch, license=license).card)


def test_without_records(checkpoint, tmp_path):
    made = card(checkpoint, tmp_path)
    data = made.data.to_dict()
    assert data == {
        "language": ["en"],
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "image-text-to-text",
        "tags": ["minigpt4", "vision-language", "image-captioning", "custom_code", "arxiv:2304.10592"],
    }
    for heading in ("Where the weights come from", "Training", "Evaluation"):
        assert f"## {heading}" not in made.text
    for heading in ("Use", "The network", "Limitations", "License", "Citation"):
        assert f"## {heading}" in made.text
    assert "None" not in made.text and "{{" not in made.text and "\n\n\n" not in made.text
    assert "contains the complete model" in made.text and "547,621 parameters, F32" in made.text
    assert "the longer the text" in made.text and "spatial relations" in made.text and "2304.10592" in made.text


def test_settings_that_differ_from_the_defaults(checkpoint, tmp_path):
    words = ["--config", "tiny_stage2", "--output", str(tmp_path / "out"), "--learning-rate", "1e-3"]
    recipe = recipe_settings(parse_recipe(words))
    run = {"recipe": recipe, "changed_settings": changed_settings(recipe), "seed": 42}
    assert len(run["recipe"]) > 100
    text = card(checkpoint, tmp_path, run=run).text
    rows = text.partition("| setting | value |\n| --- | --- |\n")[2].partition("\n\n")[0].splitlines()
    assert 10 <= len(rows) <= 20 and "| learning_rate | 0.001 |" in rows and "| max_steps | 200 |" in rows
    assert "| seed | 42 |" in rows  # of the run
    assert not any(name in text for name in ("adam_beta1", "hub_token", "output_dir", "TOKEN", "ddp_"))


def test_with_all_records(checkpoint, tmp_path):
    made = card(checkpoint, tmp_path, None, minigpt4_sources=SOURCES, run=RUN, results=RESULTS)
    data = made.data.to_dict()
    assert data["license"] == "llama2"
    assert data["base_model"] == ["Salesforce/blip2-flan-t5-xxl", "lmsys/vicuna-7b-v1.5"]
    assert data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["somebody/cc_sbu_align"]
    (entry,) = data["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "tiny-minigpt4" and result["dataset"]["type"] == "lmms-lab/GQA"
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("accuracy", 0.322), ("other", 0.5)]
    for row in (
        "| language model | lmsys/vicuna-7b-v1.5 | c3d4 |  | llama2 |",
        "| projector | pretrained_minigpt4.pth |  | e5f6 | bsd-3-clause |",
        "| somebody/cc_sbu_align | f00d | 3439 |  |",
        "| mine |  |  |  |",
        "| learning_rate | 3e-05 |",
        "| prompts | a \\| b c |",
        "| seed | 42 |",
        "| loss, last | 1.25 |",
        "Versions: torch 2.13.0, transformers 5.23.0.",
        "| gqa | lmms-lab/GQA | accuracy | 0.322 | 0.31 to 0.334 | 12578 |",
    ):
        assert f"\n{row}\n" in made.text, row
    assert "/home/somebody" not in made.content and "/data/" not in made.content
    assert "\n\n\n" not in made.text


def test_every_table_row_has_as_many_cells_as_its_head(checkpoint, tmp_path):
    made = card(checkpoint, tmp_path, minigpt4_sources=SOURCES, run=RUN, results=RESULTS)
    blocks = [block.splitlines() for block in made.text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 5
    for block in blocks:
        assert len({line.replace("\\|", "").count("|") for line in block}) == 1, block


@pytest.mark.parametrize(
    ("licenses", "derived"),
    [
        (["mit"], "mit"),
        (["apache-2.0", "apache-2.0"], "apache-2.0"),
        (["mit", "llama2", "bsd-3-clause"], "llama2"),
        ([], None),
        (["mit", None], None),
        (["mit", "apache-2.0"], None),
        (["llama2", "llama3"], None),
        (["mit", "other"], None),
    ],
)
def test_derived_license(licenses, derived):
    sources = [{"id": f"a/{number}", "revision": "r", "license": license} for number, license in enumerate(licenses)]
    if derived is not None:
        assert derive_license(sources) == License(derived)
        return
    with pytest.raises(ValueError, match="--license") as refused:
        derive_license(sources)
    assert all(f"a/{number}: {license or 'unknown'}" in str(refused.value) for number, license in enumerate(licenses))


@pytest.mark.parametrize("license", ["", "MIT", "my license", "a/b"])
def test_bad_license(license):
    with pytest.raises(ValueError, match="not an identifier of the Hub"):
        License(license)


def test_other_license_needs_name_and_link():
    with pytest.raises(ValueError, match="--license-name"):
        License("other", name="mine")
    assert yaml_dump(License("other", "mine", "LICENSE").metadata).count("\n") == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run", "{", r"run\.json is not JSON"),
        ("results", "[]", r"results\.json contains a list"),
        ("results", '{"accuracy": 1}', 'no "tasks"'),
        ("results", '{"tasks": {"gqa": {"metrics": {"accuracy": "high"}}}}', "accuracy of gqa is 'high'"),
        ("minigpt4_sources", '{"sources": [{"part": "x"}]}', "each have an 'id'"),
    ],
)
def test_bad_records(checkpoint, tmp_path, name, text, message):
    (checkpoint / f"{name}.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        card(checkpoint, tmp_path)


def test_sources_by_part(tmp_path):
    (tmp_path / "minigpt4_sources.json").write_text('{"sources": {"tower": {"id": "a/b", "revision": "r"}}}')
    assert read_sources(tmp_path) == [{"part": "tower", "id": "a/b", "revision": "r"}]
