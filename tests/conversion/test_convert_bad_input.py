"""Sources that are wrong or broken: one clear error each, and nothing left behind."""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_model import ALPHA
from released_files import (
    ORIGINAL,
    copy_llm,
    edit_pickle,
    edit_tensors,
    save_blip2,
    save_modern_language_model,
    save_t5,
    to_pickles,
)

from transformers_minigpt4.conversion.convert import convert_checkpoint


def refuse(tmp_path: Path, error: type[Exception], message: str, **changes) -> str:
    """Converts with changed sources, and looks that it stops with one message and leaves no trace."""
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(error, match=message) as caught:
        convert_checkpoint(place / "out", **{**ORIGINAL, **changes})
    assert list(place.iterdir()) == []
    return str(caught.value)


@pytest.fixture(scope="module")
def blip2_shards(golden, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip2") / "blip2"
    save_blip2(golden, folder)
    return folder


def transformers_blip2(folder: Path) -> dict:
    return {"vision": str(folder), "qformer": None, "vision_config": None, "qformer_config": None}


def test_missing_shard(blip2_shards, tmp_path):
    folder = shutil.copytree(blip2_shards, tmp_path / "blip2")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = weight_map["query_tokens"]
    (folder / shard).unlink()
    refuse(tmp_path, OSError, f"blip2 lacks 1 of the shards.*{shard}", **transformers_blip2(folder))


def test_damaged_index(blip2_shards, tmp_path):
    folder = shutil.copytree(blip2_shards, tmp_path / "blip2")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-0000', '3, "model-0000', 1).replace(': 3, "', ': 3, "x": "', 1))
    refuse(tmp_path, OSError, "model.safetensors.index.json is damaged", **transformers_blip2(folder))


def test_truncated_shard(blip2_shards, tmp_path):
    folder = shutil.copytree(blip2_shards, tmp_path / "blip2")
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]["query_tokens"]
    os.truncate(folder / shard, (folder / shard).stat().st_size - 100)
    refuse(
        tmp_path,
        OSError,
        f"{shard} is not a complete safetensors file.*download or copy",
        **transformers_blip2(folder),
    )


@pytest.mark.parametrize("name", ["vision", "qformer", "projector"])
def test_truncated_pickle(tmp_path, name):
    file = Path(shutil.copyfile(ORIGINAL[name], tmp_path / "file.pth"))
    os.truncate(file, file.stat().st_size // 2)
    refuse(tmp_path, OSError, "file.pth is not a complete PyTorch file", **{name: str(file)})


def test_a_web_page_instead_of_weights(tmp_path):
    """What a download without login leaves."""
    file = tmp_path / "eva_vit_g.pth"
    file.write_text("<!doctype html><html><head><title>403</title></head></html>\n" * 20)
    refuse(tmp_path, (OSError, ValueError), "eva_vit_g.pth is", vision=str(file))


def test_projector_of_another_width(tmp_path):
    def widen(state):
        state["llama_proj.weight"], state["llama_proj.bias"] = torch.zeros(80, 48), torch.zeros(80)

    file = edit_pickle(Path(ORIGINAL["projector"]), tmp_path / "13b.pth", widen)
    refuse(tmp_path, ValueError, "language model that is 80 wide, but llm is 64 wide", projector=str(file))


def test_projector_without_qformer_on_a_model_with_one(tmp_path):
    def widen(state):
        state["llama_proj.weight"] = torch.zeros(64, 256)

    file = edit_pickle(Path(ORIGINAL["projector"]), tmp_path / "a.pth", widen)
    refuse(tmp_path, ValueError, "takes features that are 256 wide, but gets 48", projector=str(file))


def test_projector_with_qformer_on_a_model_without(tmp_path):
    refuse(tmp_path, ValueError, "takes features that are 48 wide, but gets 256", qformer="none")


def test_half_a_layernorm_beside_the_projector(tmp_path):
    def add(state):
        state["ln_vision.weight"] = torch.ones(64)

    file = edit_pickle(Path(ORIGINAL["projector"]), tmp_path / "half.pth", add)
    refuse(tmp_path, ValueError, "half.pth has ln_vision.weight alone", projector=str(file))


def test_llama_projector_on_another_language_model(tmp_path):
    """The widths agree here, as they do for Vicuna-7B and Qwen3-8B."""
    save_modern_language_model(tmp_path / "qwen")
    refuse(tmp_path, ValueError, "trained with Vicuna.*'qwen3' model", language_model=str(tmp_path / "qwen"))


def test_llama_projector_on_a_llama_with_another_tokenizer(tmp_path):
    folder = copy_llm(tmp_path / "llama-3")
    for path in folder.glob("*token*"):
        path.unlink()
    save_modern_language_model(tmp_path / "other")
    for path in (tmp_path / "other").glob("*token*"):
        shutil.copy(path, folder)
    refuse(tmp_path, ValueError, "'llama' model with another tokenizer", language_model=str(folder))


def test_projector_on_a_tower_that_is_not_blip2s(tmp_path):
    save_t5(tmp_path / "t5")
    refuse(tmp_path, ValueError, "trained on BLIP-2's ViT-g, but .* is a 't5' model", vision=str(tmp_path / "t5"))


def test_prompts_of_a_language_model_that_may_be_llama_2(tmp_path):
    folder = copy_llm(tmp_path / "llm", max_position_embeddings=4096)
    refuse(tmp_path, ValueError, "does not look like Vicuna v0.*--chat-template llama_2", language_model=str(folder))


def test_t5_alone(tmp_path):
    save_t5(tmp_path / "t5")
    changes = {**transformers_blip2(tmp_path / "t5"), "projector": "fresh"}
    refuse(tmp_path, ValueError, "'t5' model without a vision tower", **changes)


def test_t5_as_language_model(tmp_path):
    save_t5(tmp_path / "t5")
    refuse(tmp_path, ValueError, "'t5' model, not a decoder-only", language_model=str(tmp_path / "t5"))


def test_t5_as_qformer(tmp_path):
    save_t5(tmp_path / "t5")
    refuse(tmp_path, ValueError, "'t5' model and has no Q-Former", qformer=str(tmp_path / "t5"))


class Poison:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_poisoned_pickle(tmp_path, form):
    victim, file = tmp_path / "victim", tmp_path / "poisoned.pth"
    state = {"model": {"llama_proj.weight": torch.zeros(64, 48), "llama_proj.bias": Poison(str(victim))}}
    if form == "torch":
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(state))
    message = refuse(
        tmp_path, ValueError, "poisoned.pth is a pickle that contains more than weights.*refused", projector=str(file)
    )
    assert "weights_only" not in message and "add_safe_globals" not in message
    assert not victim.exists()


def test_a_pickle_with_more_than_weights(tmp_path):
    """Harmless, and refused without torch's advice to allow it."""
    file = tmp_path / "trained.pth"
    torch.save({"model": {"llama_proj.weight": torch.zeros(1)}, "config": argparse.Namespace(lr=1)}, file)
    message = refuse(tmp_path, ValueError, r"refused\. It asks for argparse\.Namespace\. Take", projector=str(file))
    assert "weights_only" not in message and "safe_globals" not in message


def test_poisoned_language_model(tmp_path):
    folder = copy_llm(tmp_path / "llm")
    to_pickles(folder)
    torch.save({"model.embed_tokens.weight": Poison(str(tmp_path / "victim"))}, folder / "pytorch_model.bin")
    refuse(tmp_path, ValueError, "pytorch_model.bin is a pickle that contains more", language_model=str(folder))
    assert not (tmp_path / "victim").exists()


UNKNOWN = {
    "vision": lambda state: state.update({"blocks.0.attn.rel_pos": torch.zeros(1), "gamma": torch.zeros(1)}),
    "qformer": lambda state: state.update({"gamma": torch.zeros(1)}),
    "projector": lambda state: state.update({"llama_model.base_model.layers.0.lora_A.weight": torch.zeros(1)}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_tensors_are_listed(tmp_path, name):
    file = edit_pickle(Path(ORIGINAL[name]), tmp_path / "file.pth", UNKNOWN[name])
    listed = {"vision": r"blocks\.0\.attn\.rel_pos, gamma", "qformer": "gamma", "projector": "lora_A"}
    refuse(tmp_path, ValueError, rf"file\.pth contains [12] tensors .* not known.*{listed[name]}", **{name: str(file)})


def test_unknown_tensors_of_a_language_model(tmp_path):
    folder = copy_llm(tmp_path / "llm")
    edit_tensors(folder / "model.safetensors", lambda state: state.update({"score.weight": torch.zeros(2)}))
    refuse(tmp_path, ValueError, "llm contains 1 tensors that are not known.*score.weight", language_model=str(folder))


def test_tensors_that_the_config_has_no_place_for(tmp_path):
    folder = copy_llm(tmp_path / "llm", num_hidden_layers=1)
    refuse(tmp_path, ValueError, r"do not belong to the model.*layers\.1\.", language_model=str(folder))


def test_missing_tensors(tmp_path):
    folder = copy_llm(tmp_path / "llm")
    edit_tensors(folder / "model.safetensors", lambda state: state.pop("model.norm.weight"))
    refuse(tmp_path, ValueError, "1 tensors of the model are in no source: model.language_model.norm.weight",
           language_model=str(folder))  # fmt: skip


def test_shapes_are_checked_before_anything_is_written(tmp_path):
    folder = copy_llm(tmp_path / "llm", intermediate_size=176)
    message = refuse(tmp_path, ValueError, "6 tensors do not have the shapes", language_model=str(folder))
    assert r"is [160, 64], not [176, 64]" in message or r"is [64, 160], not [64, 176]" in message


def test_only_a_qformer_where_the_tower_should_be(tmp_path):
    refuse(tmp_path, ValueError, "has no cls_token.*it is not EVA-CLIP's eva_vit_g.pth", vision=ORIGINAL["qformer"])
    shutil.rmtree(tmp_path / "place")
    refuse(tmp_path, ValueError, "has no query_tokens.*it is not BLIP-2's", qformer=ORIGINAL["vision"])
    shutil.rmtree(tmp_path / "place")
    refuse(tmp_path, ValueError, "not known in the authors' checkpoints", projector=ORIGINAL["vision"])


def test_head_counts_cannot_be_guessed(tmp_path):
    refuse(tmp_path, ValueError, "64 wide, not 1408 .* vision_config=", vision_config=None)
    shutil.rmtree(tmp_path / "place")
    refuse(tmp_path, ValueError, "48 wide, not 768 .* qformer_config=", qformer_config=None)


def test_optimizer_file(tmp_path):
    file = tmp_path / "training.pth"
    torch.save({"model": {"llama_proj.weight": torch.zeros(1)}, "sampler": {}}, file)
    refuse(tmp_path, ValueError, 'contains sampler in addition to "model"', projector=str(file))


def test_names_that_lead_nowhere(tmp_path):
    refuse(tmp_path, OSError, "no file or folder ./eva_vit_g.pth", vision="./eva_vit_g.pth")
    shutil.rmtree(tmp_path / "place")
    refuse(tmp_path, OSError, "There is no file minigpt4.pth", projector="minigpt4.pth")
    shutil.rmtree(tmp_path / "place")
    (tmp_path / "meta").mkdir()
    shutil.copy(ALPHA / "llm" / "config.json", tmp_path / "meta")
    (tmp_path / "meta" / "consolidated.00.pth").touch()
    refuse(
        tmp_path,
        OSError,
        "meta contains no weights in a format of transformers",
        language_model=str(tmp_path / "meta"),
    )


@pytest.mark.parametrize(
    "key,value",
    [("num_hidden_layers", 10**7), ("hidden_size", -1), ("vocab_size", 10**12), ("num_attention_heads", 0)],
)
def test_a_config_of_impossible_sizes(tmp_path, key, value):
    folder = copy_llm(tmp_path / "llm", **{key: value})
    message = refuse(tmp_path, ValueError, "must be a whole number from 1 to", language_model=str(folder))
    assert message.startswith(f"{folder}/config.json: {key} is {value};")


def test_quantized_language_model(tmp_path):
    folder = copy_llm(tmp_path / "llm", quantization_config={"quant_method": "gptq", "bits": 4})
    refuse(tmp_path, ValueError, "is quantized", language_model=str(folder))


def test_delta_without_base(tmp_path):
    folder = copy_llm(tmp_path / "vicuna-7b-delta-v0")
    refuse(tmp_path, ValueError, "is a delta by its name", language_model=str(folder))


def test_delta_of_another_model(tmp_path):
    folder = copy_llm(tmp_path / "delta")
    edit_tensors(
        folder / "model.safetensors",
        lambda state: state.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(176, 64)}),
    )
    refuse(tmp_path, ValueError, r"delta is not a delta for llm: .*\[176, 64\] and \[160, 64\]", delta=str(folder))
    shutil.rmtree(tmp_path / "place")
    edit_tensors(folder / "model.safetensors", lambda state: state.pop("model.norm.weight"))
    refuse(tmp_path, ValueError, "only one of them has model.language_model.norm.weight", delta=str(folder))


def test_tokenizer_of_another_model(tmp_path):
    folder = copy_llm(tmp_path / "llm", vocab_size=1000)

    def cut(state):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][:1000].clone()

    edit_tensors(folder / "model.safetensors", cut)
    refuse(
        tmp_path,
        ValueError,
        "1201 tokens with the image token, but the language model 1000",
        language_model=str(folder),
    )


def test_values_that_fp16_cannot_hold(tmp_path):
    folder = copy_llm(tmp_path / "llm")

    def overflow(state):
        state["model.norm.weight"] = torch.full((64,), 1e5)

    edit_tensors(folder / "model.safetensors", overflow)
    refuse(tmp_path, ValueError, "norm.weight has values up to 1e.05, but float16 ends at 65504",
           language_model=str(folder), dtype="float16")  # fmt: skip


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"dtype": "int8"}, "dtype is 'int8'; choose auto, bfloat16"),
        ({"projector_layers": 3}, "needs a fresh projector"),
        ({"qformer": "fresh"}, "not with a fresh one"),
        ({"chat_template": "vicuna"}, "'vicuna' is neither vicuna_v0 nor llama_2"),
        ({"projector": "fresh", "projector_layers": 2}, "projector_layers is 2"),
    ],
)
def test_choices(tmp_path, changes, message):
    refuse(tmp_path, ValueError, message, **changes)


# Where it goes


def test_a_folder_with_something_in_it_is_kept(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    convert_checkpoint(output, **ORIGINAL)  # an empty one is taken
    (output / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(FileExistsError, match="not empty"):
        convert_checkpoint(output, **ORIGINAL)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    convert_checkpoint(output, overwrite=True, **ORIGINAL)
    assert {path.name for path in output.iterdir()} == before.keys() - {"notes.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_conversion_keeps_what_was_there(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    folder = copy_llm(tmp_path / "llm")
    edit_tensors(folder / "model.safetensors", lambda state: state["model.norm.weight"].fill_(1e5))
    with pytest.raises(ValueError, match="float16"):
        convert_checkpoint(output, overwrite=True, dtype="float16", **{**ORIGINAL, "language_model": str(folder)})
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llm", "out"]


def test_output_that_is_a_file_or_a_source(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        convert_checkpoint(tmp_path / "file", **ORIGINAL)
    folder = copy_llm(tmp_path / "llm")
    with pytest.raises(ValueError, match="is inside, the output folder"):
        convert_checkpoint(folder, overwrite=True, **{**ORIGINAL, "language_model": str(folder)})
    assert (folder / "model.safetensors").exists()


def test_a_folder_that_fills_during_the_conversion_is_kept(tmp_path, monkeypatch):
    """Two conversions into one folder: the second to end finds a complete checkpoint there."""
    output = tmp_path / "place" / "out"

    def other(*_):
        output.mkdir(parents=True)
        (output / "config.json").write_text("theirs")

    monkeypatch.setattr("transformers_minigpt4.conversion.convert.save_sources", other)
    with pytest.raises(FileExistsError, match="has content now: another program writes there"):
        convert_checkpoint(output, **ORIGINAL)
    assert (output / "config.json").read_text() == "theirs" and os.listdir(output.parent) == ["out"]


FULL_DISK = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from transformers_minigpt4.conversion.convert import convert_checkpoint
try:
    convert_checkpoint(sys.argv[1], **json.loads(sys.argv[2]))
except OSError as error:
    print("OSError:", error)
"""


def test_full_disk(tmp_path):
    """A limit on file sizes stops a write in its middle, as a full disk does."""
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, "-c", FULL_DISK, place / "out", json.dumps(ORIGINAL)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out failed (File too large); nothing of it is left" in done.stdout
    assert list(place.iterdir()) == []


def test_a_disk_without_room_is_seen_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    refuse(tmp_path, OSError, "takes 0.0 GB, but .* has 0.0 GB free")


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_minigpt4.conversion.convert.save_sources", interrupt)
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(place / "out", **ORIGINAL)
    assert list(place.iterdir()) == []
