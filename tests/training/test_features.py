"""Cached features train as the tower would, to the precision of bf16; stale or broken caches are never used."""

import io
import json
import pickle

import pytest
import tiny_models
import torch
from golden_model import golden_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from transformers_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from transformers_minigpt4.data.images import image_key
from transformers_minigpt4.data.schema import DataError
from transformers_minigpt4.training import feature_building
from transformers_minigpt4.training.collator import ImageTextCollator
from transformers_minigpt4.training.feature_building import build_feature_cache
from transformers_minigpt4.training.feature_cache import FeatureCache
from transformers_minigpt4.training.features import FeatureCollator, train_from_features
from transformers_minigpt4.training.fingerprints import feature_fingerprint
from transformers_minigpt4.training.loss import LabeledCollator, keep_labeled
from transformers_minigpt4.training.packing import pack
from transformers_minigpt4.training.stages import prepare_stage


@pytest.fixture
def encoded(pictures):
    """Images as sources give them: undecoded."""
    files = []
    for image in pictures:
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    return files


def make_rows(encoded, token="<ImageHere>"):
    """Rows with one, no and two pictures, and a conversation, which the collator puts in front."""
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A teacher."}]
    rows = [
        {"images": encoded[:1], "prompt": f"{token} Go: ", "completion": "A small dog.###"},
        {"images": [], "prompt": "Hi: ", "completion": "Hello.###"},
        {"images": encoded[1:], "prompt": f"{token} and {token} now: ", "completion": "Two of them.###"},
    ]
    return rows + ([{"images": encoded[2:], "messages": turns}] if token == "<ImageHere>" else [])


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def round_features(model):
    """The uncached model with features rounded as the cache rounds them: the rest must then be exact."""
    return model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: args[0].bfloat16().float())


def load(kind, folder, golden):
    if kind == "llava":
        tiny_models.save_llava(folder)
        processor = LlavaProcessor.from_pretrained(folder)
        return LlavaForConditionalGeneration.from_pretrained(folder), processor
    if kind == "modern":
        tiny_models.save_modern(folder)
    else:
        tiny_models.save_minigpt4(folder, golden, qformer=kind == "qformer")
    return MiniGPT4ForConditionalGeneration.from_pretrained(folder), MiniGPT4Processor.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["qformer", "no_qformer", "modern", "llava"])
def test_cached_training_equals_uncached(kind, tmp_path, golden, encoded):
    model, processor = load(kind, tmp_path / "model", golden)
    rows = make_rows(encoded, "<image>" if kind == "llava" else "<ImageHere>")
    collator = ImageTextCollator(processor)
    prepare_stage(model)
    model.train()
    batch = collator(rows)
    exact = gradients(model, batch)
    handle = round_features(model)
    rounded = gradients(model, batch)
    handle.remove()

    counts = build_feature_cache(model, processor.image_processor, encoded, tmp_path / "cache", batch_size=2)
    assert counts == {"encoded": 3, "present": 0, "broken": 0}
    cache = train_from_features(model, processor.image_processor, tmp_path / "cache")
    assert not list(model.model.vision_tower.parameters())  # nothing is left of the tower
    cached = FeatureCollator(collator, cache)
    batch = cached(rows)
    assert "pixel_values" not in batch and batch["image_features"].dtype == torch.bfloat16
    found = gradients(model, batch)
    assert found[0] == pytest.approx(rounded[0], abs=1e-6)
    assert found[0] == pytest.approx(exact[0], abs=0.02 * abs(exact[0]))
    for name, gradient in rounded[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)
        # bf16 keeps 8 bits; the gradients here pass through a few layers of random weights.
        assert (found[1][name] - exact[1][name]).norm() < 0.05 * exact[1][name].norm()

    keep_labeled(model)
    both = LabeledCollator(pack(model, cached, 60))(rows)  # images change their order with their rows
    again = gradients(model, both)
    assert again[0] == pytest.approx(found[0], abs=1e-5)
    for name, gradient in found[1].items():
        torch.testing.assert_close(again[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_features_are_looked_up_by_image(model, processor, encoded, tmp_path):
    build_feature_cache(model, processor.image_processor, encoded[:2], tmp_path)
    model.requires_grad_(False)
    cache = train_from_features(model, processor.image_processor, tmp_path)
    assert len(cache) == 2
    assert not torch.equal(cache[image_key(encoded[0])], cache[image_key(encoded[1])])
    with pytest.raises(DataError, match="holds no features of image"):
        cache[image_key(encoded[2])]
    with pytest.raises(RuntimeError, match="taken out"):
        model(**ImageTextCollator(processor)(make_rows(encoded)[:1]))


@pytest.fixture(autouse=True)
def frozen(request):
    if "model" in request.fixturenames:
        request.getfixturevalue("model").requires_grad_(False)


def test_an_interrupted_build_resumes(model, processor, encoded, tmp_path, monkeypatch):
    more = [Image.new("RGB", (20, 20), (i, 0, 0)) for i in range(5)]
    calls = []
    encode = feature_building._encode

    def stopping(*args):
        calls.append(len(args[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(feature_building, "_encode", stopping)
    images = [*encoded, *more]
    with pytest.raises(KeyboardInterrupt):
        build_feature_cache(model, processor.image_processor, images, tmp_path, batch_size=2, shard_size=3)
    held = sum(load_file(path)["keys"].shape[0] for path in tmp_path.glob("features-*"))
    assert held == 4  # a complete file, and what was encoded when it was interrupted
    counts = build_feature_cache(model, processor.image_processor, images, tmp_path, batch_size=2, shard_size=3)
    assert counts == {"encoded": 4, "present": 4, "broken": 0}
    assert not list(tmp_path.glob(".*"))
    cache = FeatureCache(tmp_path, feature_fingerprint(model, processor.image_processor))
    cache = pickle.loads(pickle.dumps(cache))
    with torch.no_grad():
        pixels = processor.image_processor(more, return_tensors="pt")["pixel_values"]
        expected = model.get_image_features(pixels).qformer_last_hidden_state
    for image, features in zip(more, expected):
        # 8 bits, and batches of other sizes
        torch.testing.assert_close(cache[image_key(image)].float(), features, atol=1e-4, rtol=2**-7)
    again = build_feature_cache(model, processor.image_processor, [*images, *images], tmp_path)
    assert again == {"encoded": 0, "present": 16, "broken": 0}


def test_broken_images_are_counted(model, processor, encoded, tmp_path):
    images = [encoded[0], {"bytes": b"none", "path": None}, {"bytes": None, "path": str(tmp_path / "lost.png")}]
    counts = build_feature_cache(model, processor.image_processor, images, tmp_path / "cache")
    assert counts == {"encoded": 1, "present": 0, "broken": 2}


def other_model(golden):
    return golden_model(golden["config"]).requires_grad_(False)


@pytest.mark.parametrize("change", ["tower", "qformer", "query_tokens", "dtype", "image_processor", "config"])
def test_stale_caches_are_refused(change, model, processor, encoded, tmp_path, golden):
    build_feature_cache(model, processor.image_processor, encoded, tmp_path)
    other, image_processor = other_model(golden), processor.image_processor
    FeatureCache(tmp_path, feature_fingerprint(other, image_processor))
    if change == "tower":
        other.model.vision_tower.encoder.layers[0].mlp.fc1.bias.data[0] += 1e-3
    elif change == "qformer":
        next(other.model.qformer.parameters()).data.view(-1)[0] += 1e-3
    elif change == "query_tokens":
        other.model.query_tokens.data[0, 0, 0] += 1e-3
    elif change == "dtype":
        other.model.vision_tower.bfloat16()
    elif change == "image_processor":
        image_processor = type(image_processor)(**{**image_processor.to_dict(), "resample": 2})
    else:
        other.config.vision_config.layer_norm_eps = 1e-3
    with pytest.raises(DataError, match="other frozen weights"):
        train_from_features(other, image_processor, tmp_path)
    with pytest.raises(DataError, match="other frozen weights"):
        build_feature_cache(other, image_processor, encoded, tmp_path)


def test_what_trains_does_not_make_a_cache_stale(model, processor, encoded, tmp_path):
    build_feature_cache(model, processor.image_processor, encoded, tmp_path)
    model.model.multi_modal_projector.linear_1.weight.data.zero_()
    model.lm_head.weight.data.zero_()
    assert len(train_from_features(model, processor.image_processor, tmp_path)) == 3


def test_bad_caches_are_refused(model, processor, encoded, tmp_path, golden):
    image_processor = processor.image_processor
    fingerprint = feature_fingerprint(model, image_processor)
    with pytest.raises(DataError, match="not a feature cache"):
        FeatureCache(tmp_path, fingerprint)
    build_feature_cache(model, image_processor, encoded[:0], tmp_path)
    with pytest.raises(DataError, match="no features yet"):
        FeatureCache(tmp_path, fingerprint)
    build_feature_cache(model, image_processor, encoded, tmp_path)
    (path,) = tmp_path.glob("features-*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match="is broken"):
        FeatureCache(tmp_path, fingerprint)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, tmp_path / "features-other.safetensors", metadata={"fingerprint": "another"})
    with pytest.raises(DataError, match="other frozen weights"):
        FeatureCache(tmp_path, fingerprint)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"fingerprint": fingerprint}
    (tmp_path / "features.json").write_text(json.dumps([1]))
    with pytest.raises(DataError, match="not an index"):
        FeatureCache(tmp_path, fingerprint)


def test_models_whose_features_change_are_refused(model, processor, tmp_path):
    prepare_stage(model, ["projector", "qformer"])
    with pytest.raises(ValueError, match="in front of the projector train"):
        build_feature_cache(model, processor.image_processor, [], tmp_path)
    model.requires_grad_(False)
    build_feature_cache(model, processor.image_processor, [Image.new("RGB", (8, 8))], tmp_path)
    train_from_features(model, processor.image_processor, tmp_path)
    with pytest.raises(ValueError, match="no vision tower"):
        feature_fingerprint(model, processor.image_processor)


def test_image_keys(encoded, pictures, tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(encoded[0]["bytes"])
    assert image_key({"bytes": None, "path": str(file)}) == image_key(encoded[0]) != image_key(encoded[1])
    assert image_key(pictures[0]) == image_key(pictures[0].copy()) != image_key(pictures[0].convert("L"))
    with pytest.raises(DataError, match="not str"):
        image_key("image.png")
