"""Wrong inputs and wrong checkpoints say what was given, why it cannot work and what to do."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, T5Config

from transformers_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model
from transformers_minigpt4.modeling.checkpoint_mixin_minigpt4 import CheckpointMixin


@pytest.fixture
def broken(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint, and a function that rewrites its weights."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, folder)

    def rewrite(change):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return rewrite


PROJECTOR = "model.multi_modal_projector.linear_1.weight"


def test_missing_parameter(broken):
    folder = broken(lambda weights: weights.pop(PROJECTOR))
    with pytest.raises(ValueError, match=rf"1 missing \({PROJECTOR}\).*convert"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_config_by_its_path(broken, tiny_checkpoint):
    folder = broken(lambda weights: None)
    model = MiniGPT4ForConditionalGeneration.from_pretrained(folder, config=tiny_checkpoint)
    assert model.config.text_config.vocab_size == 1201


def test_parameter_that_the_model_does_not_have(broken):
    folder = broken(lambda weights: weights.update({"llama_proj.weight": torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match=r"1 that the model does not have \(llama_proj.weight\)"):
        MiniGPT4ForConditionalGeneration.from_pretrained(folder)


def test_parameter_of_another_shape(broken):
    folder = broken(lambda weights: weights.update({PROJECTOR: torch.zeros(64, 47)}))
    with pytest.raises(ValueError, match=rf"broken: .*{PROJECTOR} has shape \[64, 47\], not \[64, 48\]"):
        MiniGPT4ForConditionalGeneration.from_pretrained(folder)
    again = MiniGPT4ForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert again.model.multi_modal_projector.linear_1.weight.shape == (64, 48)


@pytest.mark.parametrize("load", [MiniGPT4ForConditionalGeneration, MiniGPT4Model, AutoModelForImageTextToText])
@pytest.mark.parametrize(
    "section,key,value,message",
    [
        ("text_config", "num_hidden_layers", 40, r"342 missing .*layers\.10\."),
        ("text_config", "vocab_size", 2**22, r"embed_tokens.weight has shape \[1201, 64\], not \[4194304, 64\]"),
        ("vision_config", "intermediate_size", 2**20, r"fc1.* has shape .*, not \[1048576"),
        ("text_config", "rope_parameters", {"rope_type": "foo"}, "config.json: no model can be built .*'foo'"),
    ],
)
def test_a_config_larger_than_the_files(tiny_checkpoint, tmp_path, load, section, key, value, message, monkeypatch):
    """Refused before memory is allocated for any of it: transformers is not even called."""
    shutil.copytree(tiny_checkpoint, tmp_path / "large")
    content = json.loads((tmp_path / "large" / "config.json").read_text())
    content[section][key] = value
    (tmp_path / "large" / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(CheckpointMixin, "_load", lambda *args, **kwargs: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=message):
        load.from_pretrained(tmp_path / "large")


def test_trained_modules_that_do_not_fit_their_config(tiny_checkpoint, tmp_path, monkeypatch):
    model = MiniGPT4ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.save_pretrained(tmp_path, trained_only=True)
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"]["intermediate_size"] = 2**20
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(CheckpointMixin, "_load", lambda *args, **kwargs: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"mlp.* has shape .*, not .*1048576"):
        MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path)


class Poison:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_poisoned_pickle_is_refused_in_our_words(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "poisoned")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Poison(str(tmp_path / "victim"))}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^\S*/poisoned/pytorch_model.bin is a pickle .*refused") as caught:
        MiniGPT4ForConditionalGeneration.from_pretrained(folder)
    assert "weights_only" not in str(caught.value) and not (tmp_path / "victim").exists()


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_a_damaged_index(tiny_checkpoint, tmp_path, content):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(OSError, match=r"index\.json does not list the shards"):
        MiniGPT4ForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("content", ["[]", '{"base_model_name_or_path": null}'])
def test_an_adapter_without_base(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json names no base_model_name_or_path"):
        MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path)


def test_config_that_names_an_encoder_decoder(tiny_checkpoint, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = T5Config().to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="encoder-decoder"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_loading_info_on_request(tiny_checkpoint):
    model, info = MiniGPT4ForConditionalGeneration.from_pretrained(tiny_checkpoint, output_loading_info=True)
    assert isinstance(model, MiniGPT4ForConditionalGeneration) and not info["missing_keys"]


def test_more_placeholders_than_images(model):
    ids = torch.tensor([[1, *[1200] * 16, 5]])
    with pytest.raises(ValueError, match="contain 16 image placeholders, but the images give 1 x 8 tokens"):
        model(ids, pixel_values=torch.zeros(1, 3, 56, 56))


@pytest.mark.parametrize("shape", [(1, 3, 42, 42), (3, 56, 56), (1, 2, 3, 56, 56)])
def test_images_of_another_size(model, shape):
    with pytest.raises(ValueError, match=r"takes \(images, 3, 56, 56\)"):
        model.get_image_features(torch.zeros(shape))


def test_ids_and_embeddings(model):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model.model(input_ids=torch.tensor([[1]]), inputs_embeds=torch.zeros(1, 1, 64))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model.model()


def test_pixels_and_features(model):
    with pytest.raises(ValueError, match="not both"):
        model(torch.tensor([[1]]), pixel_values=torch.zeros(1, 3, 56, 56), mm_encoder_outputs={})


def test_prompt_longer_than_the_context(model, processor):
    inputs = processor(text="a " * 2100, return_tensors="pt")
    with pytest.raises(ValueError, match=r"language model was trained with 2048\. Shorten"):
        model.generate(**inputs, max_new_tokens=1)


def test_empty_prompt(model, processor):
    inputs = processor(text="", add_special_tokens=False, return_tensors="pt")
    with pytest.raises(ValueError, match="prompt is empty"):
        model(input_ids=inputs["input_ids"].long())
