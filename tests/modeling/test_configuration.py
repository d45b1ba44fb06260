"""Every variant of the paper is a configuration, and impossible ones say so when they are built."""

import json

import pytest
from transformers import (
    AutoConfig,
    BertConfig,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SwinConfig,
    T5Config,
)

from transformers_minigpt4 import MiniGPT4Config


def test_defaults_are_the_papers_model():
    config = MiniGPT4Config()
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size, vision.image_size) == (
        1408,
        39,
        6144,
        224,
    )
    assert (qformer.hidden_size, qformer.num_hidden_layers, qformer.cross_attention_frequency) == (768, 12, 2)
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (4096, 32, 32001)
    assert (config.num_query_tokens, config.projector_layers, config.vision_post_layernorm_eps) == (32, 1, 1e-5)
    assert config.image_seq_length == 32
    assert config.get_text_config() is not config


@pytest.mark.parametrize("pixels,tokens", [(224, 64), (448, 256)])
def test_tokens_without_qformer(pixels, tokens):
    config = MiniGPT4Config(vision_config={"image_size": pixels}, qformer_config=None)
    assert config.image_seq_length == tokens


def test_json_round_trip_keeps_every_field(tmp_path):
    config = MiniGPT4Config(qformer_config=None, projector_layers=3, projector_hidden_act="gelu", image_token_id=7)
    config.save_pretrained(tmp_path)
    again = MiniGPT4Config.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.qformer_config is None
    default = tmp_path / "default"
    MiniGPT4Config().save_pretrained(default)
    assert MiniGPT4Config.from_pretrained(default).qformer_config.hidden_size == 768


def test_qformer_takes_the_towers_width_unless_told():
    config = MiniGPT4Config(vision_config=CLIPVisionConfig(hidden_size=256, num_attention_heads=4))
    assert config.qformer_config.encoder_hidden_size == 256


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"text_config": T5Config()}, "encoder-decoder"),
        ({"text_config": CLIPVisionConfig()}, "causal language model"),
        ({"qformer_config": None, "vision_config": {"image_size": 70}}, "25 patches"),
        ({"qformer_config": None, "vision_config": {"image_size": 8}}, "0 patches"),
        ({"qformer_config": Blip2QFormerConfig(encoder_hidden_size=99)}, "must equal"),
        ({"num_query_tokens": 0}, "at least one query"),
        ({"projector_layers": 2}, "projector_layers is 2"),
        ({"projector_hidden_act": "gelu"}, "no effect with one linear layer"),
        ({"image_token_id": 32001}, "outside the language model's vocabulary"),
        ({"image_token_id": -1}, "outside the language model's vocabulary"),
        ({"vision_config": SiglipConfig()}, "vision tower alone"),
        ({"vision_config": BertConfig()}, "has no image_size"),
        ({"vision_config": SwinConfig()}, "no fixed sequence of patches"),
        ({"vision_config": Siglip2VisionConfig(image_size=224)}, "no fixed sequence of patches"),
        ({"text_config": Gemma3Config()}, "language model alone"),
        ({"projector_layers": 3, "projector_hidden_act": "foo"}, "unknown to transformers"),
        ({"num_query_tokens": 3000}, "3000 positions, but the language model has 2048"),
        ({"vision_config": Blip2VisionConfig(hidden_size=30, num_attention_heads=4)}, "vision_config: hidden_size=30"),
        ({"text_config": LlamaConfig(hidden_size=30, num_attention_heads=5, head_dim=6)}, "outside"),
    ],
)
def test_impossible_configurations(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MiniGPT4Config(**kwargs)


def test_keys_of_early_versions_are_read_and_saved_under_their_new_names(tmp_path):
    MiniGPT4Config(qformer_config=None, projector_layers=3, projector_hidden_act="gelu").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    for new in ("layers", "hidden_act"):
        saved[f"projection_{new}"] = saved.pop(f"projector_{new}")
    saved["base_parts"] = saved.pop("base_checkpoints")
    path.write_text(json.dumps(saved))
    for config in (MiniGPT4Config.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert (config.projector_layers, config.projector_hidden_act, config.base_checkpoints) == (3, "gelu", None)
        config.save_pretrained(tmp_path / "new")
        again = json.loads((tmp_path / "new" / "config.json").read_text())
        assert again["projector_layers"] == 3 and "base_checkpoints" in again
        assert not {"projection_layers", "projection_hidden_act", "base_parts"} & set(again)


def test_old_and_new_key_must_agree(tmp_path):
    MiniGPT4Config(qformer_config=None, projector_layers=3).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "projection_layers": 3}))
    assert MiniGPT4Config.from_pretrained(tmp_path).projector_layers == 3
    path.write_text(json.dumps({**saved, "projection_layers": 1}))
    with pytest.raises(ValueError, match=r"projector_layers=3 and, under its old name, projection_layers=1"):
        MiniGPT4Config.from_pretrained(tmp_path)


def test_an_old_argument_is_refused_with_its_new_name():
    with pytest.raises(ValueError, match="projection_layers is called projector_layers now"):
        MiniGPT4Config(projection_layers=3)


# What a hostile or damaged config.json says: a place in it, a value, and what the message must contain.
DAMAGED = [
    ("text_config", None, "text_config is null"),
    ("vision_config", None, "vision_config is null"),
    ("text_config", [], r"text_config is \[\]"),
    ("vision_config", 3, "vision_config is 3"),
    ("text_config.model_type", "foo", "text_config: Unrecognized model identifier: foo"),
    ("text_config.num_hidden_layers", 10**7, "text_config.num_hidden_layers is 10000000; .* from 1 to 1,000"),
    ("vision_config.num_hidden_layers", 10**7, "vision_config.num_hidden_layers is 10000000"),
    ("qformer_config.num_hidden_layers", 10**7, "qformer_config.num_hidden_layers is 10000000"),
    ("text_config.num_hidden_layers", -1, "text_config.num_hidden_layers is -1"),
    ("text_config.num_hidden_layers", "2", "text_config.num_hidden_layers is '2'"),
    ("text_config.num_hidden_layers", True, "text_config.num_hidden_layers is True"),
    ("text_config.hidden_size", 0, "text_config.hidden_size is 0"),
    ("text_config.hidden_size", 65, "text_config: The hidden size"),
    ("vision_config.hidden_size", 65, "vision_config: hidden_size=65 is not a multiple"),
    ("text_config.num_attention_heads", 0, "text_config.num_attention_heads is 0"),
    (
        "text_config.num_key_value_heads",
        3,
        "text_config.num_attention_heads=4 is not a multiple of num_key",
    ),
    ("text_config.vocab_size", 10**12, "text_config.vocab_size is 1000000000000"),
    ("text_config.vocab_size", None, "text_config: Field 'vocab_size' expected int"),
    ("text_config.intermediate_size", 10**12, "text_config.intermediate_size is 1000000000000"),
    ("text_config.hidden_act", "foo", "text_config.hidden_act='foo' is unknown"),
    ("vision_config.patch_size", 0, "vision_config.patch_size is 0"),
    ("vision_config.image_size", [56], r"vision_config.image_size is \[56\]; .* height and width"),
    ("qformer_config.cross_attention_frequency", 0, "qformer_config.cross_attention_frequency is 0"),
    ("num_query_tokens", "8", "Field 'num_query_tokens' expected int"),
    ("dtype", "foo", "dtype is 'foo'"),
    ("base_checkpoints", [{"name_or_path": None}], "base_checkpoints is damaged"),
]


@pytest.mark.parametrize("place,value,message", DAMAGED)
def test_a_damaged_config_is_refused_before_anything_is_built(tiny_checkpoint, tmp_path, place, value, message):
    """By our own class and by Auto classes, with file, key and value in one line."""
    with open(f"{tiny_checkpoint}/config.json") as file:
        content = section = json.load(file)
    *sections, key = place.split(".")
    for name in sections:
        section = section[name]
    section[key] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    for config_class in (MiniGPT4Config, AutoConfig):
        with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: {message}") as caught:
            config_class.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text_config",
    [
        {"model_type": "granitemoehybrid", "num_local_experts": 0},  # the dense Granite 4.0
        {"model_type": "doge", "num_experts": 16_384},
        {"model_type": "gemma4_text"},  # whose heads differ between layers
    ],
)
def test_unusual_sizes_of_released_models(text_config):
    config = MiniGPT4Config(text_config=text_config, image_token_id=0)
    assert MiniGPT4Config.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("content", ["[]", "null", "3", "[" * 100_000])
def test_a_config_that_is_no_object(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: it is .*not a JSON object"):
        MiniGPT4Config.from_pretrained(tmp_path)
