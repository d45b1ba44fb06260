"""Damaged files of a checkpoint are named in one line, before libraries stumble over them."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from transformers_minigpt4.utils.checkpoint_files import check_checkpoint_files, loading_from


DAMAGED = {
    "config.json": ["[]", "null", "3", "", '{"model_type": "mini', "[" * 100_000, b"\x80\x04\x95\xff"],
    "tokenizer.json": ["[]", b"\xff\xfe\x00"],
    "tokenizer_config.json": ["null"],
    "generation_config.json": ["[]", '{"eos_token_id": "x"}', '{"pad_token_id": [1, null]}'],
    "processor_config.json": ["null", '{"image_processor": {"size": {"height": -3, "width": 4}}}'],
    "preprocessor_config.json": ['{"size": {"shortest_edge": 1e12}}', '{"crop_size": "x"}'],
    "model.safetensors.index.json": ["[]", b"\xff\x00"],
    "chat_template.jinja": [b"\xff\xfe"],
    "model.safetensors": [b"", b"<html></html>" * 9, (2**60).to_bytes(8, "little") + b"{}"],
}


@pytest.mark.parametrize("name,content", [(name, content) for name in DAMAGED for content in DAMAGED[name]])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((OSError, ValueError)) as caught:
        check_checkpoint_files(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and "\n" not in message and len(message) < 400


def test_a_truncated_shard_counts_where_all_weights_are_needed(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "model-00001-of-00002.safetensors")
    check_checkpoint_files(tmp_path)
    with open(tmp_path / "model-00001-of-00002.safetensors", "r+b") as file:
        file.truncate(200)
    with pytest.raises(OSError, match=r"00002\.safetensors is not a complete safetensors file"):
        check_checkpoint_files(tmp_path)
    check_checkpoint_files(tmp_path, weights=False)


def test_a_tokenizer_without_its_vocabulary(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tokenizer\.json or tokenizer\.model"):
        check_checkpoint_files(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    check_checkpoint_files(tmp_path)


def test_sound_files_pass(tiny_checkpoint, tmp_path):
    check_checkpoint_files(tiny_checkpoint)
    check_checkpoint_files("someone/on-the-hub")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "pad_token_id": None}))
    for size in ({"height": 224, "width": 224}, [768, 768], 224, None):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size}))
        check_checkpoint_files(tmp_path)


def test_what_libraries_raise_becomes_one_line(tmp_path):
    with (
        pytest.raises(ValueError, match=r"someone/model cannot be loaded \(KeyError: 'rope'\)"),
        loading_from("someone/model"),
    ):
        raise KeyError("rope")
    with pytest.raises(OSError, match=r"^gone$"), loading_from("someone/model"):
        raise OSError("gone")
    with (
        pytest.raises(ValueError, match="someone/model is a pickle that contains more") as caught,
        loading_from("someone/model"),
    ):
        raise pickle.UnpicklingError("Weights only load failed. Re-running with weights_only=False")
    assert "weights_only" not in str(caught.value)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=f"^{tmp_path}/pytorch_model.bin is a pickle"), loading_from(tmp_path):
        raise pickle.UnpicklingError
