"""A checkpoint of only the trained modules equals the full one in every output bit, and knows its base."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, pipeline

from transformers_minigpt4 import MiniGPT4ForConditionalGeneration
from transformers_minigpt4.modeling.trained_modules_minigpt4 import base_checkpoint_record, fingerprint


PROMPT = "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: "
PROJECTOR = "model.multi_modal_projector.linear_1."


@pytest.fixture
def base(tiny_checkpoint, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, folder)
    return folder


def train(model):
    """Moves the projector, as training does."""
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model


@pytest.fixture
def folders(base, tmp_path, processor):
    """The same trained model, saved completely and as its trained modules."""
    model = train(AutoModelForImageTextToText.from_pretrained(base))
    full, trained = tmp_path / "full", tmp_path / "trained"
    model.save_pretrained(full)
    model.save_pretrained(trained, trained_only=True)
    for folder in (full, trained):
        processor.save_pretrained(folder)
    return full, trained


@pytest.fixture
def inputs(processor, pictures):
    return processor(images=pictures[0], text=PROMPT, return_tensors="pt")


def test_size_and_record(folders, base):
    _, trained = folders
    tensors = load_file(trained / "model.safetensors")
    assert set(tensors) == {PROJECTOR + "weight", PROJECTOR + "bias"}
    config = json.loads((trained / "config.json").read_text())
    (record,) = config["base_checkpoints"]
    assert record["name_or_path"] == str(base) and len(record["fingerprint"]) == 64
    assert config["trained_parameters"] == sorted(tensors)
    assert json.loads((folders[0] / "config.json").read_text())["base_checkpoints"] is None


def test_every_bit_of_the_output(folders, inputs):
    full, trained = (AutoModelForImageTextToText.from_pretrained(folder) for folder in folders)
    assert torch.equal(full(**inputs).logits, trained(**inputs).logits)
    assert full.state_dict().keys() == trained.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(full.state_dict().values(), trained.state_dict().values()))
    assert trained.generation_config.to_dict() == full.generation_config.to_dict()
    assert trained.model.vision_tower.post_layernorm.eps == 1e-5


@pytest.mark.parametrize(
    "options", [{"device_map": "auto"}, {"dtype": torch.bfloat16}, {"attn_implementation": "eager"}]
)
def test_options_of_loading(folders, inputs, options):
    full, trained = (AutoModelForImageTextToText.from_pretrained(folder, **options) for folder in folders)
    cast = {k: v.to(full.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    assert torch.equal(full(**cast).logits, trained(**cast).logits)
    assert trained.model.multi_modal_projector.linear_1.weight.dtype == torch.float32


def test_base_class_and_pipeline(folders, pictures):
    full, trained = folders
    a, b = AutoModel.from_pretrained(full), AutoModel.from_pretrained(trained)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    options = {"generate_kwargs": {"do_sample": False, "max_new_tokens": 5}}
    assert pipeline("image-to-text", model=str(full))(pictures[0], **options) == pipeline(
        "image-to-text", model=str(trained)
    )(pictures[0], **options)


def test_merging_is_bit_exact(folders, tmp_path):
    merged = tmp_path / "merged"
    AutoModelForImageTextToText.from_pretrained(folders[1]).save_pretrained(merged)
    assert (merged / "model.safetensors").read_bytes() == (folders[0] / "model.safetensors").read_bytes()
    a, b = (json.loads((folder / "config.json").read_text()) for folder in (merged, folders[0]))
    assert a.pop("trained_parameters") == [PROJECTOR + "bias", PROJECTOR + "weight"]  # the record for stage 2
    assert b.pop("trained_parameters") is None  # nobody has recorded it
    assert a == b


def test_second_stage_refers_to_the_first_base(folders, base, tmp_path):
    model = train(AutoModelForImageTextToText.from_pretrained(folders[1]))
    model.save_pretrained(tmp_path / "stage2", trained_only=True)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "stage2")
    assert again.config.base_checkpoints[0]["name_or_path"] == str(base)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    # Another module on top: what the first stage trained stays in the checkpoint.
    again.requires_grad_(False)
    again.model.query_tokens.requires_grad_(True)
    with torch.no_grad():
        again.model.query_tokens.add_(1.0)
    again.save_pretrained(tmp_path / "queries", trained_only=True)
    assert set(load_file(tmp_path / "queries" / "model.safetensors")) == {
        PROJECTOR + "weight",
        PROJECTOR + "bias",
        "model.query_tokens",
    }
    last = AutoModelForImageTextToText.from_pretrained(tmp_path / "queries")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), last.state_dict().values()))


def test_bases_of_other_shapes_and_names(base, golden, inputs, tmp_path):
    """A tower from one checkpoint and a language model, one row short, from another."""
    from golden_model import ALPHA

    weights = load_file(base / "model.safetensors")
    vision, own = {}, {}
    for name, tensor in weights.items():
        if name.startswith(("model.vision_tower.", "model.qformer.", "model.query_tokens")):
            vision[name.replace("model.vision_tower.", "vision_model.").removeprefix("model.")] = tensor
        elif name.startswith(PROJECTOR):
            own[name] = tensor
    vision["language_model.t5"] = torch.zeros(2)
    (tmp_path / "blip2").mkdir()
    save_file(vision, tmp_path / "blip2" / "model.safetensors")
    for key in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        own[key + "@rows"] = weights[key][1200:]
    trained = tmp_path / "trained"
    shutil.copytree(base, trained)
    save_file(own, trained / "model.safetensors")
    config = json.loads((trained / "config.json").read_text())
    blip2 = {
        "vision_model.": "model.vision_tower.",
        "qformer.": "model.qformer.",
        "query_tokens": "model.query_tokens",
    }
    llm = {"model.embed_tokens.": "model.language_model.embed_tokens.", "model.norm.": "model.language_model.norm."}
    llm |= {f"model.layers.{i}.{part}.": f"model.language_model.layers.{i}.{part}." for i in range(2)
            for part in ("mlp", "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
                         "self_attn.v_proj", "self_attn.o_proj")}  # fmt: skip
    llm["lm_head."] = "lm_head."
    config["base_checkpoints"] = [
        base_checkpoint_record(str(tmp_path / "blip2"), blip2),
        base_checkpoint_record(str(ALPHA / "llm"), llm),
    ]
    (trained / "config.json").write_text(json.dumps(config))
    model = AutoModelForImageTextToText.from_pretrained(trained)
    expected = AutoModelForImageTextToText.from_pretrained(base)
    assert torch.equal(model(**inputs).logits, expected(**inputs).logits)


def test_without_the_package(folders, inputs, tmp_path):
    script = """
import sys
class Blocker:
    def find_spec(self, name, *args):
        if name.split(".")[0] == "transformers_minigpt4":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForImageTextToText
models = [AutoModelForImageTextToText.from_pretrained(f, trust_remote_code=True) for f in sys.argv[1:3]]
same = [torch.equal(a, b) for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values())]
assert same and all(same)
models[1].requires_grad_(False)
models[1].model.multi_modal_projector.requires_grad_(True)
models[1].save_pretrained(sys.argv[3], trained_only=True)
AutoModelForImageTextToText.from_pretrained(sys.argv[3], trust_remote_code=True)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    arguments = [str(folders[0]), str(folders[1]), str(tmp_path / "again")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_lora_on_trained_modules(folders, inputs, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = AutoModelForImageTextToText.from_pretrained(folders[1])
    lora = get_peft_model(
        model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    )
    expected = lora(**inputs).logits
    lora.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folders[1]), tmp_path / "lora")
    assert torch.equal(again(**inputs).logits, expected)
    for loader in (AutoModelForImageTextToText, MiniGPT4ForConditionalGeneration):  # they find the base by themselves
        assert torch.equal(loader.from_pretrained(tmp_path / "lora")(**inputs).logits, expected)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(whole(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_fingerprint_is_of_content_not_of_files(base, tmp_path):
    whole = fingerprint([base / "model.safetensors"])
    AutoModelForImageTextToText.from_pretrained(base).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1 and fingerprint(shards) == whole
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, base / "model.safetensors")
    assert fingerprint([base / "model.safetensors"]) != whole


def test_other_weights_in_the_bases_place(folders, base):
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not those that this checkpoint was trained on.*Take the original base"):
        AutoModelForImageTextToText.from_pretrained(folders[1])


def test_base_that_has_gone(folders, base):
    shutil.rmtree(base)
    with pytest.raises(OSError, match=r"the rest is in .*base.*cannot be read"):
        AutoModelForImageTextToText.from_pretrained(folders[1])


def test_base_with_a_truncated_file(folders, base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="not a complete safetensors file"):
        AutoModelForImageTextToText.from_pretrained(folders[1])


def test_model_without_a_base(model, tmp_path):
    with pytest.raises(ValueError, match="not loaded from a checkpoint"):
        model.save_pretrained(tmp_path / "trained", trained_only=True)


def test_nothing_trained(base, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(base).requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter requires gradients"):
        model.save_pretrained(tmp_path / "trained", trained_only=True)
    assert not (tmp_path / "trained").exists()


def test_the_bases_own_folder(base):
    weights = (base / "model.safetensors").read_bytes()
    model = train(AutoModelForImageTextToText.from_pretrained(base))
    with pytest.raises(ValueError, match="is the base itself"):
        model.save_pretrained(base, trained_only=True)
    assert (base / "model.safetensors").read_bytes() == weights


def test_one_folder_for_both_kinds(folders, tmp_path, inputs):
    """The folder holds what was saved last, and nothing of the kind saved before."""
    full, trained = folders
    model = AutoModelForImageTextToText.from_pretrained(trained)
    expected = model(**inputs).logits
    model.save_pretrained(trained, max_shard_size="100KB")
    assert not (trained / "model.safetensors").exists()
    assert torch.equal(AutoModelForImageTextToText.from_pretrained(trained)(**inputs).logits, expected)
    train(AutoModelForImageTextToText.from_pretrained(full)).save_pretrained(trained, trained_only=True)
    assert [path.name for path in trained.glob("*.safetensors*")] == ["model.safetensors"]
    AutoModelForImageTextToText.from_pretrained(trained)


def test_other_processes_write_nothing(base, tmp_path):
    model = train(AutoModelForImageTextToText.from_pretrained(base))
    model.save_pretrained(tmp_path / "trained", trained_only=True, is_main_process=False)
    assert not (tmp_path / "trained").exists()


def test_grown_vocabulary_would_be_lost(base, tmp_path):
    model = train(AutoModelForImageTextToText.from_pretrained(base))
    model.resize_token_embeddings(1210)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(ValueError, match="would lose them"):
        model.save_pretrained(tmp_path / "trained", trained_only=True)


def test_adapters_are_peft_s_to_save(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForImageTextToText.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    with pytest.raises(ValueError, match="saved by PEFT"):
        model.save_pretrained(tmp_path / "trained", trained_only=True)


def test_base_class_and_foreign_options(base, tmp_path):
    with pytest.raises(ValueError, match="has no head"):
        AutoModel.from_pretrained(base).save_pretrained(tmp_path / "trained", trained_only=True)
    model = train(AutoModelForImageTextToText.from_pretrained(base))
    with pytest.raises(ValueError, match="cannot be combined with push_to_hub"):
        model.save_pretrained(tmp_path / "trained", trained_only=True, push_to_hub=True)


def test_changes_that_would_be_lost(base, tmp_path):
    model = train(AutoModelForImageTextToText.from_pretrained(base))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match=r"lm_head.weight.*would lose them"):
        model.save_pretrained(tmp_path / "trained", trained_only=True)
    assert not (tmp_path / "trained" / "model.safetensors").exists()


def test_a_checkpoint_saved_under_the_old_key_still_loads(folders, inputs):
    _, trained = folders
    path = trained / "config.json"
    saved = json.loads(path.read_text())
    saved["base_parts"] = saved.pop("base_checkpoints")
    saved["projection_layers"] = saved.pop("projector_layers")
    path.write_text(json.dumps(saved))
    models = [AutoModelForImageTextToText.from_pretrained(folder) for folder in folders]
    assert torch.equal(models[0](**inputs).logits, models[1](**inputs).logits)
    assert models[1].config.trained_parameters == sorted(load_file(trained / "model.safetensors"))
