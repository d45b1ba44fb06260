"""Reading tensors by their offsets and writing safetensors: the same bits as with the libraries."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transformers_minigpt4.conversion.compose import constant
from transformers_minigpt4.conversion.tensor_files import DTYPES, read_file
from transformers_minigpt4.conversion.weights import Weights, open_weights, save_pieces


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """Every dtype, odd sizes, a scalar, an empty tensor."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"part.{name}": (torch.randn(3, 5, generator=generator) * 50).to(dtype) for name, dtype in DTYPES.items()
    }
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "half": torch.ones(7).half()}


def assert_equal(weights: Weights, state: dict[str, torch.Tensor]) -> None:
    assert weights.entries.keys() == state.keys()
    for name, tensor in state.items():
        read = weights.read(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape and torch.equal(read, tensor), name


@pytest.mark.parametrize("form", ["safetensors", "zip", "old"])
def test_reading(state, tmp_path, form):
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.bin")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    assert_equal(Weights("file", read_file(path)), state)


def test_safetensors_under_another_name(state, tmp_path):
    save_file(state, tmp_path / "model.ckpt")
    assert_equal(Weights("file", read_file(tmp_path / "model.ckpt")), state)


def test_views_in_pickles(tmp_path):
    """Tensors that share a storage, start inside it, are transposed or expanded."""
    block = torch.arange(60.0).reshape(6, 10)
    state = {
        "whole": block,
        "rows": block[2:4],
        "columns": block[:, 3:5],
        "turned": block.t(),
        "wide": block[0].expand(4, 10),
    }
    torch.save(state, tmp_path / "model.bin")
    assert_equal(Weights("file", read_file(tmp_path / "model.bin")), {k: v.contiguous() for k, v in state.items()})


def test_writing(state, tmp_path):
    pieces = {name: constant(tensor) for name, tensor in state.items()}
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    counted = []
    save_pieces(tmp_path, pieces, dtypes, "5GB", counted.append)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert_equal(Weights("file", read_file(tmp_path / "model.safetensors")), state)
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
    assert sum(counted) == sum(tensor.nbytes for tensor in state.values())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_with_an_index(tmp_path):
    state = {f"layer.{i}": torch.full((16, 16), float(i)) for i in range(5)}  # 1 KiB each
    pieces = {name: constant(tensor) for name, tensor in state.items()}
    save_pieces(tmp_path, pieces, dict.fromkeys(state, torch.float32), 2100)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path)) == [*shards, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 1280, "total_size": 5120}
    assert_equal(open_weights(str(tmp_path)), state)
    opened = open_weights(str(tmp_path), wanted=lambda key: key == "layer.4")
    assert list(opened.entries) == ["layer.4"] and opened.keys == sorted(state)


def test_converting_while_writing(tmp_path, monkeypatch):
    """In parts, each of them as the whole would be."""
    monkeypatch.setattr("transformers_minigpt4.conversion.tensor_files._CHUNK_BYTES", 1000)
    tensor = torch.randn(100, 33, generator=torch.Generator().manual_seed(0))
    save_pieces(tmp_path, {"a": constant(tensor)}, {"a": torch.bfloat16}, "5GB")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor.bfloat16())


def test_digest_is_of_the_tensors_read(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    torch.save(dict(reversed(state.items())), tmp_path / "model.bin")
    first, second = (Weights("file", read_file(tmp_path / name)) for name in ("model.safetensors", "model.bin"))
    for name in ("scalar", "half"):
        first.read(name)
    for name in ("half", "scalar"):
        second.read(name)
    assert first.digest() == second.digest()
    second.read("empty")
    assert first.digest() != second.digest()
    state["half"][3] = 2
    save_file(state, tmp_path / "other.safetensors")
    third = Weights("file", read_file(tmp_path / "other.safetensors"))
    for name in ("half", "scalar"):
        third.read(name)
    assert third.digest() != first.digest()


def test_index_that_names_what_no_shard_holds(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00001.safetensors")
    weight_map = {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(OSError, match="names b, which no shard contains"):
        open_weights(str(tmp_path))


def test_quantized_types_are_refused(tmp_path):
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"F8_E4M3.*quantized"):
        read_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {}])
def test_pickles_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"contains (no weights|entries that are not tensors)"):
        read_file(tmp_path / "model.pth")


def test_a_compressed_archive_is_no_pytorch_file(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "weights.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"x" * 1000)
    with pytest.raises(OSError, match="compressed zip archive"):
        read_file(tmp_path / "weights.pth")


def test_a_pytorch_file_is_mapped_anew_so_that_its_pages_do_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_minigpt4.conversion.tensor_files._MAPPED_BYTES", 1000)
    state = {f"layer.{i}": torch.full((16, 16), float(i)) for i in range(5)}  # 1 KiB each
    torch.save(state, tmp_path / "model.bin")
    entries = read_file(tmp_path / "model.bin")
    mappings = set()
    for name, tensor in state.items():
        assert torch.equal(torch.cat(list(entries[name].parts())), tensor.reshape(-1))
        mappings.add(id(entries[name].file.state))
    assert len(mappings) > 1


def test_a_tensor_that_was_read_can_be_changed(tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path / "model.bin")
    entry = read_file(tmp_path / "model.bin")["a"]
    entry.read().add_(1)
    assert not entry.read().any()
