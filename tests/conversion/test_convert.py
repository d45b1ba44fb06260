"""Conversion of released parts: parity with the authors' code, every source format, and what ends up in the folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_model import ALPHA, golden_model
from hub_server import Blob, HubServer
from released_files import (
    ORIGINAL,
    copy_llm,
    edit_json,
    edit_pickle,
    edit_tensors,
    save_blip2,
    save_modern_language_model,
    save_tower,
    to_pickles,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
)

from transformers_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from transformers_minigpt4.conversion import key_maps
from transformers_minigpt4.conversion.convert import convert_checkpoint
from transformers_minigpt4.conversion.sources import open_vision_tower
from transformers_minigpt4.conversion.tensor_files import Block
from transformers_minigpt4.conversion.weights import Weights


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """The golden model, made of the authors' files."""
    return convert_checkpoint(tmp_path_factory.mktemp("converted") / "checkpoint", **ORIGINAL)


@pytest.fixture(scope="module")
def blip2(golden, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip2") / "blip2-flan-t5-tiny"
    save_blip2(golden, folder)
    return folder


def load(folder: Path, **kwargs) -> MiniGPT4ForConditionalGeneration:
    return MiniGPT4ForConditionalGeneration.from_pretrained(folder, **kwargs)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() and first
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name


# Parity


def ids_of(layout: list) -> list[int]:
    return [i for kind, value in layout for i in ([1200] * value if kind == "image" else value)]


@torch.no_grad()
def test_the_authors_files_give_the_authors_model(converted, golden, golden_tensors):
    """Tolerances of golden/README.md."""
    model = load(converted)
    features = model.get_image_features(golden_tensors["pixel_values"])
    torch.testing.assert_close(features.last_hidden_state, golden_tensors["image_embeds"], atol=2e-5, rtol=0)
    torch.testing.assert_close(features.pooler_output, golden_tensors["inputs_llama"], atol=3e-6, rtol=0)
    for name in ("stage1", "stage2"):
        rows = golden["cases"][name]["rows"]
        mask = torch.tensor([row["attention_mask"] for row in rows])
        output = model(
            input_ids=torch.tensor([ids_of(row["layout"]) for row in rows]),
            attention_mask=mask,
            labels=torch.tensor([row["targets"] for row in rows]),
            pixel_values=golden_tensors["pixel_values"][golden["cases"][name]["images"]],
        )
        assert output.loss.item() == pytest.approx(golden["cases"][name]["loss"], abs=1e-5)
        real = mask.bool()
        expected = golden_tensors[f"{name}.logits"]
        torch.testing.assert_close(output.logits[..., :1200][real], expected[real], atol=5e-5, rtol=0)
    for chat in ("vicuna0", "llama2", "two_uploads"):
        record = golden["cases"]["chat"][chat]
        for turn in record["turns"]:
            prompt = torch.tensor([ids_of(turn["layout"])])
            images = golden_tensors["pixel_values"][record["images"]]
            greedy = {"do_sample": False, "repetition_penalty": 1.0, "min_new_tokens": 12, "max_new_tokens": 12}
            answer = model.generate(prompt, pixel_values=images, **greedy)
            assert answer[0, prompt.shape[1] :].tolist() == turn["new_token_ids"]


def test_prompts_are_tokenized_as_the_authors_do(converted, golden):
    processor = MiniGPT4Processor.from_pretrained(converted)
    cases = json.loads((ALPHA.parent / "tokenizer" / "golden_tokens.json").read_text())["encode"]
    cases = [case for case in cases if "<ImageHere>" not in case["text"]]
    assert len(cases) > 40
    for case in cases:
        assert processor.tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]


# Formats of the same weights


@pytest.mark.parametrize("form", ["shards", "one file", "pickled shards", "one pickle"])
def test_blip2_of_transformers_gives_the_same_bits(converted, golden, blip2, tmp_path, form):
    """Also: no shard of the T5 is needed, where there are shards."""
    folder = tmp_path / "blip2"
    if "one" in form:
        save_blip2(golden, folder, shard_size="1GB")
    else:
        shutil.copytree(blip2, folder)
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        used = {
            shard for key, shard in weight_map.items() if key.startswith(("vision_model", "qformer", "query_tokens"))
        }
        assert used < set(weight_map.values())
        for shard in set(weight_map.values()) - used:
            (folder / shard).unlink()
    if "pickle" in form:
        to_pickles(folder)
    sources = {key: ORIGINAL[key] for key in ("language_model", "projector")}
    output = convert_checkpoint(tmp_path / "out", vision=str(folder), dtype="float32", **sources)
    reference = {name: tensor.float() for name, tensor in stored(converted).items()}
    assert_same(stored(output), reference)
    assert_same(load(output).state_dict(), load(converted).state_dict())


def test_qformer_of_transformers_beside_the_authors_tower(converted, blip2, tmp_path):
    sources = {**ORIGINAL, "qformer": str(blip2)}
    assert_same(stored(convert_checkpoint(tmp_path / "out", **sources)), stored(converted))


@pytest.mark.parametrize("form", ["shards", "pickled shards", "one pickle", "old pickle"])
def test_language_model_of_any_form(converted, tmp_path, form):
    folder = copy_llm(tmp_path / "llm")
    if form == "old pickle":
        torch.save(
            load_file(folder / "model.safetensors"),
            folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=False,
        )
        (folder / "model.safetensors").unlink()
    else:
        if "shards" in form:
            _split(folder)
        if "pickle" in form:
            to_pickles(folder)
    output = convert_checkpoint(tmp_path / "out", **{**ORIGINAL, "language_model": str(folder)})
    assert_same(stored(output), stored(converted))


def _split(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(state))}
    for shard in set(names.values()):
        save_file({name: state[name] for name in names if names[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "model.safetensors").unlink()


FETCH = """
import sys
from transformers_minigpt4.conversion.convert import convert_checkpoint
convert_checkpoint(sys.argv[1], vision="org/blip2", language_model="org/llm@v1", projector=sys.argv[2])
"""


def test_from_the_hub_the_t5_is_not_fetched(converted, blip2, tmp_path):
    with HubServer() as hub:
        for name, folder in (("org/blip2", blip2), ("org/llm", ALPHA / "llm")):
            repository = hub.create("models", name)
            files = {path.name: Blob(path.read_bytes(), path.suffix == ".safetensors") for path in folder.iterdir()}
            files["README.md"] = Blob(b"---\nlicense: mit\n---\n", False)
            hub.commit(repository, "main", files, "weights")
            hub.commit(repository, "v1", files, "weights")
        done = subprocess.run(
            [sys.executable, "-c", FETCH, tmp_path / "out", ORIGINAL["projector"]],
            capture_output=True,
            text=True,
            env={
                **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
                **{"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
            },
        )
        assert done.returncode == 0, done.stderr
        fetched = {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
        commits = {name: hub.repositories["models", name].sha("v1") for name in ("org/blip2", "org/llm")}
    weight_map = json.loads((blip2 / "model.safetensors.index.json").read_text())["weight_map"]
    t5_alone = set(weight_map.values()) - {
        shard for key, shard in weight_map.items() if not key.startswith(("language_model", "language_projection"))
    }
    assert t5_alone and not fetched & t5_alone
    assert_same(load(tmp_path / "out").state_dict(), load(converted).state_dict())
    sources = {
        row["part"]: row for row in json.loads((tmp_path / "out" / "minigpt4_sources.json").read_text())["sources"]
    }
    assert sources["language_model"]["id"] == "org/llm"
    assert sources["language_model"]["revision"] == commits["org/llm"]
    assert sources["vision_tower"]["license"] == "mit"


# What the folder holds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loading_and_saving_gives_the_same_bits(tmp_path, dtype):
    output = convert_checkpoint(tmp_path / "out", dtype=dtype, max_shard_size="300KB", **ORIGINAL)
    model = load(output)
    assert model.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    assert_same(model.state_dict(), stored(output))
    model.save_pretrained(tmp_path / "again")
    MiniGPT4Processor.from_pretrained(output).save_pretrained(tmp_path / "again")
    assert_same(stored(tmp_path / "again"), stored(output))
    names = {path.name for path in output.iterdir() if not path.name.startswith("model")}
    assert names - {"minigpt4_sources.json", "minigpt4_weights.json"} == {
        path.name for path in (tmp_path / "again").iterdir() if not path.name.startswith("model")
    }
    assert len(list(output.glob("model-*.safetensors"))) > 1
    # transformers notes in the tokenizer's config how it was loaded.
    for name in names - {"minigpt4_sources.json", "minigpt4_weights.json", "tokenizer_config.json"}:
        ours, again = (output / name).read_text(), (tmp_path / "again" / name).read_text()
        assert again == ours, name


def test_dtypes(converted, tmp_path):
    kept = {name: tensor.dtype for name, tensor in stored(converted).items()}
    assert {dtype for name, dtype in kept.items() if "vision_tower.encoder" in name} == {torch.float16}  # as released
    assert {dtype for name, dtype in kept.items() if "language_model" in name} == {torch.float32}
    half = stored(convert_checkpoint(tmp_path / "half", dtype="float16", **ORIGINAL))
    in_fp32 = {name for name, tensor in half.items() if tensor.dtype == torch.float32}
    fp32_modules = ("model.qformer.", "model.query_tokens", "model.multi_modal_projector.", key_maps.POST_LAYERNORM)
    assert in_fp32 == {name for name in half if name.startswith(fp32_modules)}
    brain = stored(convert_checkpoint(tmp_path / "brain", dtype="bfloat16", **ORIGINAL))
    assert {name for name, tensor in brain.items() if tensor.dtype == torch.float32} == {
        key_maps.PROJECTOR + "linear_1.weight",
        key_maps.PROJECTOR + "linear_1.bias",
    }


def test_auto_classes_load_it_and_it_describes(converted, pictures):
    model = AutoModelForImageTextToText.from_pretrained(converted)
    processor = AutoProcessor.from_pretrained(converted)
    chat = [{"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "Hello?"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4


def test_special_tokens_are_the_tokenizers(converted):
    """The config of the golden language model says bos 0, eos 1, pad -1, as Vicuna v0's does."""
    model = load(converted)
    text_config, generation = model.config.text_config, model.generation_config
    assert (text_config.bos_token_id, text_config.eos_token_id, text_config.pad_token_id) == (1, 2, 0)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, [2, 376], 0)
    assert generation.stop_sequences == [[300, 1157]]


def test_nothing_tells_where_the_files_were(tmp_path):
    folder = copy_llm(tmp_path / "secret-place" / "llm", _name_or_path="/home/somebody/llama")
    save_modern_language_model(tmp_path / "secret-place" / "modern")
    (tmp_path / "secret-place" / "tower").mkdir()
    save_tower("siglip", tmp_path / "secret-place" / "tower")
    one = convert_checkpoint(tmp_path / "one", **{**ORIGINAL, "language_model": str(folder)})
    two = convert_checkpoint(
        tmp_path / "two",
        vision=str(tmp_path / "secret-place" / "tower"),
        language_model=str(tmp_path / "secret-place" / "modern"),
    )
    for path in (*one.rglob("*"), *two.rglob("*")):
        content = path.read_bytes()
        assert b"secret-place" not in content and b"somebody" not in content, path


def test_record_of_the_sources(converted, tmp_path):
    record = json.loads((converted / "minigpt4_sources.json").read_text())
    rows = {row["part"]: row for row in record["sources"]}
    assert {part: row["id"] for part, row in rows.items()} == {
        "vision_tower": "eva_vit_g.pth",
        "qformer": "blip2_pretrained_flant5xxl.pth",
        "language_model": "llm",
        "projector": "minigpt4_stage2.pth",
    }
    folder = copy_llm(tmp_path / "llm")
    _split(folder)  # other files, the same tensors
    (folder / "README.md").write_text("---\nlicense: llama2\n---\n")
    other = convert_checkpoint(tmp_path / "out", **{**ORIGINAL, "language_model": str(folder)})
    again = {row["part"]: row for row in json.loads((other / "minigpt4_sources.json").read_text())["sources"]}
    assert again["language_model"].pop("license") == "llama2"
    del rows["language_model"]["license"]
    assert again == rows


# The image token


def test_the_image_token_gets_a_row(converted):
    weights = stored(converted)
    source = load_file(ALPHA / "llm" / "model.safetensors")
    embedding, head = weights[key_maps.EMBEDDING], weights[key_maps.HEAD]
    assert torch.equal(embedding[:-1], source["model.embed_tokens.weight"]) and torch.equal(
        head[:-1], source["lm_head.weight"]
    )
    torch.testing.assert_close(embedding[-1], source["model.embed_tokens.weight"].mean(0), atol=1e-7, rtol=1e-4)
    assert not head[-1].any()
    assert load(converted).config.text_config.vocab_size == 1201


def test_a_spare_row_is_used(tmp_path):
    """Such as Vicuna v0's, whose [PAD] LLaMA's tokenizer does not know."""
    folder = copy_llm(tmp_path / "llm", vocab_size=1201)

    def add_row(state):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = torch.cat([state[name], torch.full((1, 64), 0.25)])

    edit_tensors(folder / "model.safetensors", add_row)
    output = convert_checkpoint(tmp_path / "out", **{**ORIGINAL, "language_model": str(folder)})
    weights = stored(output)
    assert weights[key_maps.EMBEDDING].shape[0] == 1201 and (weights[key_maps.EMBEDDING][-1] == 0.25).all()
    assert load(output).config.image_token_id == 1200


BROKEN_TOKENIZERS = {
    "of the first conversions": ("LLaMATokenizer", {"bos_token": "", "eos_token": "", "unk_token": ""}, False),
    "with empty special tokens": ("LlamaTokenizer", {"bos_token": "", "eos_token": "", "unk_token": ""}, False),
    "of Vicuna v0": ("LlamaTokenizer", {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}, True),
}


@pytest.mark.parametrize("name", BROKEN_TOKENIZERS)
def test_broken_tokenizers_are_mended(converted, tmp_path, name):
    tokenizer_class, special, pad = BROKEN_TOKENIZERS[name]
    folder = copy_llm(tmp_path / "llm")
    edit_json(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class, **special)
    if pad:
        special = {**special, "pad_token": "[PAD]"}
        (folder / "added_tokens.json").write_text('{"[PAD]": 1200}')
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    edit_json(folder / "config.json", vocab_size=1200)
    if pad:

        def add_row(state):
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                state[name] = torch.cat([state[name], torch.zeros(1, 64)])

        edit_tensors(folder / "model.safetensors", add_row)
    output = convert_checkpoint(tmp_path / "out", **{**ORIGINAL, "language_model": str(folder)})
    mended, right = MiniGPT4Processor.from_pretrained(output), MiniGPT4Processor.from_pretrained(converted)
    tokenizer = mended.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    text = "###Human: Describe this image in detail. ###Assistant: "
    assert tokenizer.encode(text) == right.tokenizer.encode(text)
    assert mended.image_token_id == (1201 if pad else 1200)
    assert load(output).config.text_config.vocab_size == mended.image_token_id + 1


# Vicuna deltas


@pytest.mark.parametrize("extra", [0, 1], ids=["v1.1", "v0"])
def test_delta(tmp_path, extra):
    """FastChat: base in fp16, with rows of zeros where the delta has more, plus delta in fp16."""
    base, delta = copy_llm(tmp_path / "llama"), copy_llm(tmp_path / "tiny-delta-v0", vocab_size=1200 + extra)
    generator = torch.Generator().manual_seed(3)

    def to_delta(state):
        for name, tensor in state.items():
            rows = extra if name in ("model.embed_tokens.weight", "lm_head.weight") else 0
            shape = (tensor.shape[0] + rows, *tensor.shape[1:])
            state[name] = (torch.randn(shape, generator=generator) * 0.02).half()

    edit_tensors(delta / "model.safetensors", to_delta)
    if extra:
        (delta / "added_tokens.json").write_text('{"[PAD]": 1200}')
        edit_json(delta / "special_tokens_map.json", pad_token="[PAD]")
    sources = {**ORIGINAL, "language_model": str(base), "delta": str(delta)}
    weights = stored(convert_checkpoint(tmp_path / "out", **sources))

    start, change = load_file(base / "model.safetensors"), load_file(delta / "model.safetensors")
    for name, tensor in change.items():
        if "inv_freq" in name:
            continue
        expected = start[name].half()
        if expected.shape != tensor.shape:
            expected = torch.cat([expected, torch.zeros(extra, 64, dtype=torch.float16)])
        expected = expected + tensor
        ours = weights[name if name.startswith("lm_head") else name.replace("model.", key_maps.LANGUAGE, 1)]
        assert ours.dtype == torch.float16 and torch.equal(ours[: len(expected)], expected), name
    config = load(tmp_path / "out").config
    assert config.image_token_id == 1200 + extra and config.text_config.vocab_size == 1201 + extra
    parts = [row["part"] for row in json.loads((tmp_path / "out" / "minigpt4_sources.json").read_text())["sources"]]
    assert "language_model_delta" in parts


# Other towers, other language models, fresh parts


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov3"])
def test_modern_towers_and_language_model(tmp_path, pictures, kind):
    tower = save_tower(kind, tmp_path / "tower")
    save_modern_language_model(tmp_path / "lm")
    sources = {"vision": str(tmp_path / "tower"), "language_model": str(tmp_path / "lm")}
    output = convert_checkpoint(tmp_path / "out", dtype="float32", **sources)
    model, processor = load(output).eval(), MiniGPT4Processor.from_pretrained(output)
    assert model.config.image_seq_length == 4  # 16 patches by 4
    inputs = processor(images=[[pictures[0]]], text=["<ImageHere>"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 56, 56) and inputs["input_ids"].shape == (1, 4)
    with torch.no_grad():
        ours = model.get_image_features(inputs["pixel_values"]).last_hidden_state
        theirs = tower.eval()(inputs["pixel_values"]).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    model.save_pretrained(tmp_path / "again")
    assert_same(stored(tmp_path / "again"), stored(output))


def test_modern_language_model(tmp_path):
    """Tied embeddings grow together; the chat template and the ends of turns are its own."""
    save_tower("siglip", tmp_path / "tower")
    save_modern_language_model(tmp_path / "lm")
    sources = {"vision": str(tmp_path / "tower"), "language_model": str(tmp_path / "lm")}
    output = convert_checkpoint(tmp_path / "out", projector_layers=3, projector_hidden_act="gelu", **sources)
    weights, source = stored(output), load_file(tmp_path / "lm" / "model.safetensors")
    assert key_maps.HEAD not in weights
    embedding = source["model.embed_tokens.weight"]
    assert weights[key_maps.EMBEDDING].dtype == torch.bfloat16
    assert torch.equal(weights[key_maps.EMBEDDING][:-1], embedding)
    torch.testing.assert_close(
        weights[key_maps.EMBEDDING][-1].double(), embedding.double().mean(0), atol=1e-4, rtol=1e-2
    )
    model, processor = load(output), MiniGPT4Processor.from_pretrained(output)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.model.multi_modal_projector.linear_3 is not None and model.config.projector_hidden_act == "gelu"
    assert sorted(model.generation_config.eos_token_id) == [0, 2]
    assert "<|im_start|>" in processor.chat_template
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id == 2


def test_untied_language_model_with_spare_rows(tmp_path):
    save_tower("siglip", tmp_path / "tower")
    save_modern_language_model(tmp_path / "lm", tie=False, spare_rows=5)
    sources = {"vision": str(tmp_path / "tower"), "language_model": str(tmp_path / "lm")}
    output = convert_checkpoint(tmp_path / "out", **sources)
    weights, source = stored(output), load_file(tmp_path / "lm" / "model.safetensors")
    assert torch.equal(weights[key_maps.EMBEDDING], source["model.embed_tokens.weight"])
    assert torch.equal(weights[key_maps.HEAD], source["lm_head.weight"])
    load(output)


def test_fresh_parts_are_drawn_by_the_seed(tmp_path):
    save_tower("siglip", tmp_path / "tower")
    save_modern_language_model(tmp_path / "lm")
    sources = {"vision": str(tmp_path / "tower"), "language_model": str(tmp_path / "lm"), "qformer": "fresh"}
    changes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    state = torch.get_rng_state()
    first, again, other = (
        stored(convert_checkpoint(tmp_path / str(i), seed=seed, qformer_config=changes, **sources))
        for i, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(first, again)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    assert key_maps.QUERIES in drawn and key_maps.PROJECTOR + "linear_1.weight" in drawn
    assert not any(name.startswith((key_maps.TOWER, key_maps.LANGUAGE)) for name in drawn)
    assert load(tmp_path / "0").config.image_seq_length == 32


def test_projector_without_qformer(golden, blip2, tmp_path):
    """Variant (a): `ln_vision` was never loaded there, whatever the source holds (golden/README.md, trap 5)."""

    def without_qformer(state):
        torch.manual_seed(4)
        state["llama_proj.weight"] = torch.randn(64, 256)
        del state["Qformer.bert.embeddings.position_ids"]

    file = edit_pickle(Path(ORIGINAL["projector"]), tmp_path / "no_qformer.pth", without_qformer)
    for name, vision in (
        ("original", {"vision": ORIGINAL["vision"], "vision_config": ORIGINAL["vision_config"]}),
        ("blip2", {"vision": str(blip2)}),
    ):
        sources = {**vision, "language_model": ORIGINAL["language_model"], "projector": str(file)}
        model = load(convert_checkpoint(tmp_path / name, dtype="float32", **sources))
        assert model.model.qformer is None and model.config.image_seq_length == 4
        layernorm = model.model.vision_tower.post_layernorm
        assert (layernorm.weight == 1).all() and not layernorm.bias.any()
        reference = golden_model(golden["config"]).model.vision_tower
        assert_same(model.model.vision_tower.encoder.state_dict(), reference.encoder.state_dict())


def test_projector_with_a_trained_qformer(tmp_path):
    """Variant (c): the Q-Former that trained stands in the authors' checkpoint, and before the pretrained one."""
    pretrained = torch.load(ORIGINAL["qformer"], weights_only=True)["model"]
    trained = {
        key: value + 1 for key, value in pretrained.items() if key.startswith(("query_tokens", "Qformer.bert.encoder"))
    }
    file = edit_pickle(Path(ORIGINAL["projector"]), tmp_path / "c.pth", lambda state: state.update(trained))
    output = stored(convert_checkpoint(tmp_path / "out", **{**ORIGINAL, "projector": str(file)}))
    assert torch.equal(output[key_maps.QUERIES], pretrained["query_tokens"] + 1)
    query = "encoder.layer.0.attention.{}.query.weight"
    expected = pretrained["Qformer.bert." + query.format("self")] + 1
    assert torch.equal(output[key_maps.QFORMER + query.format("attention")], expected)
    assert torch.equal(
        output[key_maps.QFORMER + "layernorm.weight"], pretrained["Qformer.bert.embeddings.LayerNorm.weight"]
    )


@pytest.mark.parametrize("qformer", [True, False])
def test_projector_with_a_trained_layernorm(tmp_path, qformer):
    """`ckpt_with_ln_vision.pth`: what was trained replaces BLIP-2's `ln_vision`, and the plain one of variant (a)."""
    weight, bias = torch.linspace(0.5, 2, 64), torch.linspace(-1, 1, 64)

    def add(state):
        state.update({"ln_vision.weight": weight, "ln_vision.bias": bias})
        if not qformer:
            state["llama_proj.weight"] = torch.randn(64, 256)

    file = edit_pickle(Path(ORIGINAL["projector"]), tmp_path / "ckpt_with_ln_vision.pth", add)
    sources = {**ORIGINAL, "projector": str(file), **({} if qformer else {"qformer": "none"})}
    folder = convert_checkpoint(tmp_path / "out", dtype="float16", **sources)
    trained = json.loads((folder / "config.json").read_text())["trained_parameters"]
    assert len(trained) == 4 and key_maps.POST_LAYERNORM + "bias" in trained
    output = stored(folder)
    assert torch.equal(output[key_maps.POST_LAYERNORM + "weight"], weight)
    assert torch.equal(output[key_maps.POST_LAYERNORM + "bias"], bias)
    assert torch.equal(load(folder).model.vision_tower.post_layernorm.bias, bias)


# Key maps


@pytest.mark.parametrize("blocks", [40, 39])
def test_vit_g_takes_39_blocks(monkeypatch, blocks):
    """The released file holds 40 blocks and the authors load 39; a file that has lost the last one serves as well."""
    width, hidden = 1408, 6144
    block = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.q_bias": (width,),
        "attn.v_bias": (width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden),
        "mlp.fc2.bias": (width,),
    }
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 257, width), "patch_embed.proj.weight": (width, 3, 14, 14)}
    shapes["patch_embed.proj.bias"] = (width,)
    shapes.update({f"blocks.{n}.{name}": shape for n in range(blocks) for name, shape in block.items()})
    entries = {name: Block(torch.float16, shape, Path("eva_vit_g.pth"), 0) for name, shape in shapes.items()}
    monkeypatch.setattr(
        "transformers_minigpt4.conversion.sources.open_weights",
        lambda *args, **kwargs: Weights("eva_vit_g.pth", entries),
    )
    part = open_vision_tower("eva_vit_g.pth", None, {})
    config = part.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.image_size) == (39, 16, 224)
    assert (config.hidden_size, config.intermediate_size, config.patch_size) == (1408, 6144, 14)
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in part.pieces if ".layers." in name}
    assert layers == set(range(39))
    assert part.pieces[key_maps.TOWER + "encoder.layers.38.self_attn.qkv.bias"].shape == (3 * width,)


def test_every_key_of_the_released_files_is_known():
    """With the names that golden/README.md says real files may hold besides."""
    also = ["opt_proj.weight", "Qformer.cls.predictions.bias", "temp", "itm_head.weight"]
    also += ["Qformer.bert.embeddings.word_embeddings.weight", "Qformer.bert.encoder.layer.3.intermediate.dense.bias"]
    pretrained = torch.load(ORIGINAL["qformer"], weights_only=True)["model"]
    used = key_maps.LAVIS_QFORMER.apply([*pretrained, *also], "file")
    ignored = {"Qformer.bert.embeddings.position_ids", "t5_proj.weight", "t5_proj.bias"}
    assert set(pretrained) - set(used) == ignored
    eva = torch.load(ORIGINAL["vision"], weights_only=True)
    assert set(eva) - set(key_maps.EVA_VIT.apply([*eva, "fc_norm.weight"], "file")) == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }


def test_keys_that_no_map_knows_stop_with_a_list():
    with pytest.raises(ValueError, match=r"file contains 2 tensors that are not known.*blocks\.0\.gamma, extra"):
        key_maps.EVA_VIT.apply(["cls_token", "extra", "blocks.0.gamma"], "file")


def test_two_keys_for_one_place_stop():
    two = key_maps.KeyMap("a format", {"a": "x", "b": "x"})
    with pytest.raises(ValueError, match="several tensors for the same name: x"):
        two.apply(["a", "b"], "file")
