"""Publishes PEFT adapters, and the complete models that they make, to a small Hub on loopback; loads them back."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_publish import MIT, REPO, contents, hub, minigpt4_push, run_elsewhere  # noqa: F401  hub is a fixture
from transformers import AutoModelForImageTextToText

from transformers_minigpt4.hub.publish import prepare, push_to_hub
from transformers_minigpt4.inference.loading import load_model_and_processor
from transformers_minigpt4.training.checkpoints import save_trained


BASE = "somebody/tiny-base"


@pytest.fixture(scope="module")
def lora(tiny_checkpoint, processor):
    """A model with adapters that change its answers, and a projector that was trained with them."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    config = LoraConfig(
        r=2,
        target_modules=r".*language_model.*q_proj",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    lora = get_peft_model(model, config).eval()
    with torch.no_grad():
        lora.base_model.model.model.multi_modal_projector.modules_to_save["default"].linear_1.weight.mul_(1.5)
    return lora


@pytest.fixture
def adapter(lora, processor, tmp_path) -> Path:
    save_trained(lora, tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    record = {"recipe": {"lora_r": 2, "seed": 42}, "changed_settings": {"lora_r": 2}}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(record))
    (tmp_path / "adapter" / "training_args.bin").write_bytes(b"pickle")
    return tmp_path / "adapter"


@pytest.fixture
def inputs(processor, pictures):
    return processor(images=pictures[0], text="<ImageHere> a", return_tensors="pt")


def test_published_and_loaded(hub: HubServer, adapter, lora, inputs, tiny_checkpoint):  # noqa: F811
    push_to_hub(tiny_checkpoint, BASE, license=MIT)
    result = minigpt4_push(adapter, REPO, "--license", "mit", "--base", BASE)
    assert result.exit_code == 0, result.output
    files = contents(hub)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "processor_config.json"} <= set(files)
    assert "processing_minigpt4.py" in files and "training_args.bin" not in files
    assert "model.safetensors" not in files and "config.json" not in files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    local = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert local == tiny_checkpoint  # as it was

    expected = lora(**inputs).logits
    base = AutoModelForImageTextToText.from_pretrained(BASE)
    assert not torch.equal(base(**inputs).logits, expected)
    assert torch.equal(PeftModel.from_pretrained(base, REPO).eval()(**inputs).logits, expected)
    model, processor = load_model_and_processor(REPO, device="cpu")
    assert torch.equal(model(**inputs).logits, expected) and type(processor).__name__ == "MiniGPT4Processor"


def test_card(adapter, tmp_path):
    publication = prepare(adapter, REPO, tmp_path / "scratch", license=MIT, base=f"{BASE}@v1")
    assert json.loads(publication.files["adapter_config.json"])["revision"] == "v1"
    card = ModelCard(publication.card)
    data = card.data.to_dict()
    assert data["library_name"] == "peft" and data["base_model"] == [BASE] and data["license"] == "mit"
    assert data["base_model_relation"] == "adapter" and data["pipeline_tag"] == "image-text-to-text"
    assert {"lora", f"base_model:adapter:{BASE}", "minigpt4"} <= set(data["tags"])
    assert f"A PEFT adapter (LoRA, rank 2) for the MiniGPT-4 checkpoint [{BASE}]" in card.text
    assert "contains the trained projector as well" in card.text and 'revision="v1"' in card.text
    assert "| lora_r | 2 |" in card.text and "| seed |" not in card.text
    assert "None" not in card.text and "{{" not in card.text and "\n\n\n" not in card.text


def test_the_code_of_the_card_runs_without_this_package(hub, adapter, tiny_checkpoint, tmp_path, pictures):  # noqa: F811
    push_to_hub(tiny_checkpoint, BASE, license=MIT)
    push_to_hub(adapter, REPO, license=MIT, base=BASE)
    pictures[0].save(tmp_path / "image.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", contents(hub)["README.md"].decode(), re.DOTALL)
    assert run_elsewhere(code, hub, tmp_path).strip()


def test_merged(hub, adapter, lora, inputs):  # noqa: F811
    result = minigpt4_push(adapter, REPO, "--license", "mit", "--merge")
    assert result.exit_code == 0, result.output
    files = contents(hub)
    assert "model.safetensors" in files and not any(name.startswith("adapter") for name in files)
    assert "run.json" in files and "contains the complete model" in files["README.md"].decode()
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]
    model, _ = load_model_and_processor(REPO, device="cpu")
    torch.testing.assert_close(model(**inputs).logits, lora(**inputs).logits, atol=1e-5, rtol=0)


def test_merged_trained_modules(hub, tiny_checkpoint, processor, tmp_path):  # noqa: F811
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    with torch.no_grad():
        projector.linear_1.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "trained", trained_only=True)
    processor.save_pretrained(tmp_path / "trained")
    push_to_hub(tmp_path / "trained", REPO, license=MIT, merge=True)
    (tmp_path / "model.safetensors").write_bytes(contents(hub)["model.safetensors"])
    name = "model.multi_modal_projector.linear_1.weight"
    assert torch.equal(load_file(tmp_path / "model.safetensors")[name], projector.linear_1.weight)


class TestRefusals:
    def refused(self, *words: str | Path) -> str:
        result = minigpt4_push(*words, "--license", "mit", "--dry-run")
        assert isinstance(result.exception, ValueError), result.output
        return str(result.exception)

    def change(self, adapter: Path, **settings: object) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    def test_a_local_base(self, adapter):
        message = self.refused(adapter, REPO)
        assert "is a folder on this computer (checkpoint)" in message
        assert "--base namespace/name" in message and "--merge" in message
        self.change(adapter, base_model_name_or_path="../stage1")
        assert "is a folder on this computer (stage1)" in self.refused(adapter, REPO)
        self.change(adapter, base_model_name_or_path=None)
        assert "(not recorded)" in self.refused(adapter, REPO)

    def test_a_relative_base_is_saved_with_its_full_path(self, lora, tiny_checkpoint, tmp_path, monkeypatch):
        base = Path(tiny_checkpoint)
        monkeypatch.chdir(base.parent.parent)
        relative = str(base.relative_to(base.parent.parent))  # which could be the name of a repository
        monkeypatch.setattr(lora.peft_config["default"], "base_model_name_or_path", relative)
        save_trained(lora, tmp_path / "adapter")
        monkeypatch.chdir(tmp_path)
        assert "is a folder on this computer (checkpoint)" in self.refused(tmp_path / "adapter", REPO)

    def test_a_base_that_is_on_the_hub(self, adapter, tmp_path):
        self.change(adapter, base_model_name_or_path=BASE)
        publication = prepare(adapter, REPO, tmp_path / "scratch", license=MIT)
        assert publication.files["adapter_config.json"] == adapter / "adapter_config.json"

    def test_a_pickle(self, adapter):
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        assert "contains no adapter_model.safetensors; save the adapter again" in self.refused(adapter, REPO)

    def test_another_model(self, adapter, tiny_checkpoint, tmp_path):
        base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "llava"))
        (base / "config.json").write_text(json.dumps({"model_type": "llava"}))
        self.change(adapter, base_model_name_or_path=str(base))
        assert "is an adapter of a 'llava' model" in self.refused(adapter, REPO, "--base", BASE)

    def test_options_that_exclude_each_other(self, adapter):
        assert "leave out --base somebody/tiny-base or --merge" in self.refused(
            adapter, REPO, "--base", BASE, "--merge"
        )
