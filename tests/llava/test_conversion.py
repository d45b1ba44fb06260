"""LLaVA's checkpoints from the authors' format and back, and composed from released parts."""

import inspect
import json
import shutil

import pytest
import torch
from golden_llava import GOLDEN, build, our_name
from golden_model import GOLDEN as SHARED
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from transformers_minigpt4 import LlavaLinearForConditionalGeneration
from transformers_minigpt4.conversion.llava import convert_llava, export_projector
from transformers_minigpt4.conversion.presets import fill_in_llava


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """The authors' checkpoint with its tokenizer, and the tower beside it."""
    folder = tmp_path_factory.mktemp("authors")
    shutil.copytree(GOLDEN / "linear", folder / "linear")
    shutil.copytree(GOLDEN / "clip", folder / "clip")
    for file in (SHARED / "tokenizer").iterdir():
        shutil.copy(file, folder / "linear")
    return folder / "linear"


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def projector(path) -> dict:
    return torch.load(path, weights_only=True)


def language_model(authors, folder):
    """The language model alone."""
    shutil.copytree(authors, folder, ignore=shutil.ignore_patterns("model.safetensors", "*.bin", "config.json"))
    state = load_file(authors / "model.safetensors")
    kept = {name: value for name, value in state.items() if "mm_projector" not in name and "vision_tower" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = (authors / "config.json").read_text().replace('"llava_llama"', '"llama"')
    (folder / "config.json").write_text(config)
    return str(folder)


@pytest.mark.parametrize("form", ["safetensors", "bin shards", "without tower"])
def test_a_complete_checkpoint_comes_and_its_projector_goes(form, authors, tmp_path):
    source = authors
    if form != "safetensors":
        source = tmp_path / "linear"
        shutil.copytree(authors, source, ignore=shutil.ignore_patterns("model.safetensors", "*.bin"))
        shutil.copytree(authors.parent / "clip", tmp_path / "clip")
        state = load_file(authors / "model.safetensors")
        if form == "without tower":
            state = {name: value for name, value in state.items() if "vision_tower" not in name}
            torch.save(state, source / "pytorch_model.bin")
        else:
            names = sorted(state)
            shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
            for file, held in shards.items():
                torch.save({name: state[name] for name in held}, source / file)
            index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
            (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    folder = convert_llava(tmp_path / "ours", language_model=str(source))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(model, LlavaLinearForConditionalGeneration)
    assert model.config.vision_feature_layer == -2 and model.config.image_seq_length == 16
    ours = model.state_dict()
    for name, value in load_file(authors / "model.safetensors").items():
        assert torch.equal(ours[our_name(name)][: len(value)], value), name
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.legacy and processor.prompt_format == "llava_v1" and not processor.image_processor.do_pad
    exported = export_projector(str(folder), tmp_path / "mm_projector.bin")
    assert same(projector(exported), projector(GOLDEN / "linear" / "mm_projector.bin"))


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_parts_are_composed_with_a_projector(kind, authors, tmp_path):
    base = language_model(authors, tmp_path / "language")
    given = GOLDEN / kind / "mm_projector.bin"
    options = {"vision": str(GOLDEN / "clip"), "projector": str(given), "pad_images": True}
    folder = convert_llava(tmp_path / "ours", language_model=base, prompt_format="llava_v0", **options)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    expected = LlavaLinearForConditionalGeneration if kind == "linear" else LlavaForConditionalGeneration
    assert type(model) is expected
    for name, value in build(kind).state_dict().items():
        assert torch.equal(model.state_dict()[name][:1200], value[:1200]), name
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.writes("llava_v0") and processor.image_processor.do_pad
    assert same(projector(export_projector(str(folder), tmp_path / "out.bin")), projector(given))


def test_fresh_projectors_are_drawn_by_the_seed(authors, tmp_path):
    base = language_model(authors, tmp_path / "language")
    drawn = []
    for number, (layers, seed) in enumerate([(1, 0), (1, 0), (1, 1), (2, 0)]):
        options = {"vision": str(GOLDEN / "clip"), "projector_layers": layers, "seed": seed}
        folder = convert_llava(tmp_path / str(number), language_model=base, **options)
        drawn.append(projector(export_projector(str(folder), tmp_path / f"{number}.bin")))
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2])
    assert drawn[3].keys() == projector(GOLDEN / "mlp2x_gelu" / "mm_projector.bin").keys()


def test_what_does_not_fit_is_refused(authors, tmp_path):
    with pytest.raises(ValueError, match="complete LLaVA"):
        convert_llava(tmp_path / "x", language_model=str(authors), projector=str(authors / "mm_projector.bin"))
    with pytest.raises(OSError, match="has no tokenizer"):
        convert_llava(tmp_path / "x", language_model=str(GOLDEN / "linear"))
    with pytest.raises(ValueError, match="give --vision"):
        convert_llava(tmp_path / "x", language_model=language_model(authors, tmp_path / "language"))
    torch.save({"model.mm_projector.weight": torch.zeros(48, 32)}, tmp_path / "half.bin")
    options = {"vision": str(GOLDEN / "clip"), "projector": str(tmp_path / "half.bin")}
    with pytest.raises(ValueError, match="no projector of LLaVA"):
        convert_llava(tmp_path / "x", language_model=str(tmp_path / "language"), **options)
    with pytest.raises(ValueError, match="no projector of LLaVA"):
        export_projector(str(tmp_path / "language"), tmp_path / "out.bin")
    assert not (tmp_path / "x").exists() and not (tmp_path / "out.bin").exists()


def test_options_of_the_command():
    options = fill_in_llava("llava-vicuna-7b-base", {"pad_images": True, "chat_template": "llava_v1"})
    assert options["prompt_format"] == "llava_v1" and options["pad_images"] and options["projector_layers"] == 1
    assert set(options) <= set(inspect.signature(convert_llava).parameters)
    for preset, given, message in (
        ("vicuna-7b", {}, "is a MiniGPT-4"),
        (None, {"qformer": "x", "language_model": "y"}, "--qformer is for MiniGPT-4"),
        (None, {}, "give --language-model"),
    ):
        with pytest.raises(ValueError, match=message):
            fill_in_llava(preset, given)
