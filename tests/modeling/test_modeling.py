"""The model behaves as transformers' own image-text models do: caches, padding, saving, precision, compilation."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DINOv3ViTConfig,
    DynamicCache,
    LlamaForCausalLM,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.cache_utils import StaticCache
from versions import enable_gradient_checkpointing, needs_transformers

from transformers_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Model


PROMPTS = [
    "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: ",
    "###Human: What is a boat? ###Assistant: ",
    "###Human: <Img><ImageHere></Img> <Img><ImageHere></Img> What is different? ###Assistant: ",
]
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "min_new_tokens": 6, "max_new_tokens": 6}


@pytest.fixture
def mixed(processor, pictures):
    """One image, text alone, and two images, in one batch."""
    images = [[pictures[0]], [], [pictures[1], pictures[2]]]
    return processor(images=images, text=PROMPTS, padding=True, return_tensors="pt")


def new_ids(model, inputs, **kwargs):
    output = model.generate(**inputs, **{**GREEDY, **kwargs})
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def tiny_config(**kwargs):
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    defaults = {
        "vision_config": {"model_type": "blip_2_vision_model", "image_size": 28, "patch_size": 7, **vision},
        "text_config": {"model_type": "llama", "vocab_size": 50, **text},
        "image_token_id": 49,
        "num_query_tokens": 5,
    }
    if "qformer_config" not in kwargs:
        size = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 20}
        defaults["qformer_config"] = size
    return MiniGPT4Config(**{**defaults, **kwargs})


def test_mixed_batch_equals_rows_alone(model, processor, pictures, mixed):
    images = [[pictures[0]], None, [pictures[1], pictures[2]]]
    alone = [new_ids(model, processor(images=i, text=t, return_tensors="pt"))[0] for i, t in zip(images, PROMPTS)]
    assert new_ids(model, mixed) == alone
    assert len({tuple(ids) for ids in alone}) == 3


def test_padding_side_does_not_matter(model, processor, pictures, mixed):
    right = processor(
        images=[[pictures[0]], [], [pictures[1], pictures[2]]],
        text=PROMPTS,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    assert right["attention_mask"][1, -1] == 0 and mixed["attention_mask"][1, 0] == 0
    a, b = model(**mixed).logits, model(**right).logits
    torch.testing.assert_close(a[mixed["attention_mask"].bool()], b[right["attention_mask"].bool()], atol=2e-5, rtol=0)


def test_different_pictures_give_different_answers(model, processor, pictures):
    inputs = [processor(images=picture, text=PROMPTS[0], return_tensors="pt") for picture in pictures]
    logits = [model(**i).logits[0, -1] for i in inputs]
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize("use", ["no_cache", "static", "beam", "assistant", "lookup", "chunked"])
def test_ways_to_generate_agree(model, mixed, processor, pictures, use):
    expected = new_ids(model, mixed)
    if use == "no_cache":
        assert new_ids(model, mixed, use_cache=False) == expected
    elif use == "static":
        assert new_ids(model, mixed, cache_implementation="static") == expected
    elif use == "chunked":
        with needs_transformers("5.23"):
            assert new_ids(model, mixed, prefill_chunk_size=7) == expected
    elif use == "beam":
        assert new_ids(model, mixed, num_beams=1) == expected
        best = model.generate(
            **mixed, **GREEDY, num_beams=4, num_return_sequences=4, return_dict_in_generate=True, output_scores=True
        )
        scores = best.sequences_scores.view(3, 4)
        assert (scores.diff(dim=1) <= 0).all() and best.sequences.shape[0] == 12
    else:
        one = processor(images=pictures[0], text=PROMPTS[0], return_tensors="pt")
        extra = {"prompt_lookup_num_tokens": 2} if use == "lookup" else {"assistant_model": copy.deepcopy(model)}
        assert new_ids(model, one, **extra) == new_ids(model, one)


def test_sampling_follows_the_seed(model, mixed):
    torch.manual_seed(0)
    a = new_ids(model, mixed, do_sample=True)
    torch.manual_seed(0)
    assert new_ids(model, mixed, do_sample=True) == a


def test_each_row_stops_at_its_own_mark(model, processor):
    """Row 0 says `###` as two tokens, row 1 as one, row 2 never."""
    one, two = [376], [300, 1157]
    config = processor.get_generation_config()
    assert one[0] in config.eos_token_id and config.stop_sequences == [two]
    plan = torch.tensor([[600, *two, 700, 701], [*one, 702, 703, 704, 705], [601, 1157, 300, 602, 603]])

    def say(input_ids, scores):
        step = input_ids.shape[1] - 3
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter(1, plan[:, step : step + 1], 0.0)

    ids = torch.tensor([[1, 10, 11]] * 3)
    output = model.generate(ids, do_sample=False, min_new_tokens=0, max_new_tokens=5, logits_processor=[say])[:, 3:]
    pad = processor.tokenizer.pad_token_id
    assert output.tolist() == [[600, *two, pad, pad], [*one, pad, pad, pad, pad], [601, 1157, 300, 602, 603]]


def test_image_token_is_never_said(model, mixed):
    model.lm_head.weight.data[model.config.image_token_id] = 1e3
    assert all(1200 not in row for row in new_ids(model, mixed, max_new_tokens=12, min_new_tokens=12))


def test_precomputed_features(model, mixed):
    expected = model(**mixed).logits
    features = {"image": model.get_image_features(mixed["pixel_values"])}
    rest = {k: v for k, v in mixed.items() if k != "pixel_values"}
    torch.testing.assert_close(model(**rest, mm_encoder_outputs=features).logits, expected)
    output = model.generate(**rest, **GREEDY, mm_encoder_outputs=features)
    assert output[:, rest["input_ids"].shape[1] :].tolist() == new_ids(model, mixed)


def test_embeddings_in_place_of_ids(model, mixed):
    embeds = model.get_input_embeddings()(mixed["input_ids"])
    logits = model(
        inputs_embeds=embeds, attention_mask=mixed["attention_mask"], pixel_values=mixed["pixel_values"]
    ).logits
    torch.testing.assert_close(logits, model(**mixed).logits)


def test_second_turn_reuses_the_cache(model, processor, pictures):
    first = processor(images=pictures[0], text=PROMPTS[0], return_tensors="pt")
    cache = DynamicCache(config=model.config.get_text_config())
    answer = model.generate(**first, **GREEDY, past_key_values=cache)
    more = torch.cat([answer, torch.tensor([[300, 1157, 1169, 410]])], dim=1)
    with_cache = model.generate(more, past_key_values=cache, **GREEDY)
    fresh = model.generate(more, pixel_values=first["pixel_values"], **GREEDY)
    assert with_cache.tolist() == fresh.tolist()


def test_logits_to_keep(model, mixed):
    logits = model(**mixed).logits
    torch.testing.assert_close(model(**mixed, logits_to_keep=2).logits, logits[:, -2:])
    kept = torch.tensor([0, 3])
    torch.testing.assert_close(model(**mixed, logits_to_keep=kept).logits, logits[:, kept])


def test_gradient_checkpointing_gives_the_same_gradients(model, mixed):
    def gradient():
        model.zero_grad()
        model(**mixed, labels=mixed["input_ids"].masked_fill(mixed["attention_mask"] == 0, -100)).loss.backward()
        return model.model.multi_modal_projector.linear_1.weight.grad.clone()

    model.train()
    for module in model.modules():  # dropout of the Q-Former draws new masks in the recomputation otherwise
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.model.qformer.config.attention_probs_dropout_prob = 0.0
    for module in model.model.qformer.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    plain = gradient()
    enable_gradient_checkpointing(model)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    torch.testing.assert_close(gradient(), plain)
    assert plain.abs().sum() > 0


def test_eager_and_sdpa_agree_and_flex_reaches_the_decoder(model, mixed, tiny_checkpoint):
    expected = model(**mixed).logits[mixed["attention_mask"].bool()]
    for implementation in ("eager", "sdpa"):
        other = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, attn_implementation=implementation)
        assert other.config.get_text_config()._attn_implementation == implementation
        logits = other(**mixed).logits[mixed["attention_mask"].bool()]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    only_text = AutoModelForImageTextToText.from_pretrained(
        tiny_checkpoint, attn_implementation={"text_config": "flex_attention"}
    )
    assert only_text.model.language_model.config._attn_implementation == "flex_attention"
    assert only_text.model.vision_tower.config._attn_implementation == "sdpa"


def test_custom_attention_function_receives_keyword_arguments(model, mixed):
    """The contract by which serving engines put their own attention into the decoder."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    seen = []

    def engine_attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((type(module).__name__, kwargs.get("engine_argument")))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("engine", engine_attention)
    AttentionMaskInterface.register("engine", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    expected = model.model(**mixed).last_hidden_state
    model.config.get_text_config()._attn_implementation = "engine"
    output = model.model(**mixed, engine_argument=7).last_hidden_state
    assert seen == [("LlamaAttention", 7)] * 2
    torch.testing.assert_close(output, expected)


@pytest.mark.slow
def test_full_graph_compilation_of_decoding(model, processor, pictures):
    inputs = processor(images=pictures[0], text=PROMPTS[0], return_tensors="pt")
    expected = model(**inputs).logits[:, -1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=80)
    with torch.no_grad():
        prefill = compiled(**inputs, past_key_values=cache, logits_to_keep=1)
        torch.testing.assert_close(prefill.logits[:, -1], expected, atol=2e-5, rtol=0)
        token = prefill.logits[:, -1:].argmax(-1)
        position = torch.tensor([[inputs["input_ids"].shape[1]]])
        step = compiled(input_ids=token, past_key_values=cache, position_ids=position)
        longer = torch.cat([inputs["input_ids"], token], dim=1)
        reference = model(input_ids=longer, pixel_values=inputs["pixel_values"]).logits[:, -1]
    torch.testing.assert_close(step.logits[:, -1], reference, atol=5e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_checkpoint, mixed, dtype):
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=dtype)
    projector, qformer = model.model.multi_modal_projector.linear_1, model.model.qformer
    assert projector.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.dtype == dtype
    expected = torch.float32 if dtype == torch.float16 else dtype
    assert qformer.layernorm.weight.dtype == model.model.query_tokens.dtype == expected
    assert model.model.vision_tower.post_layernorm.weight.dtype == expected
    full = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    real = mixed["attention_mask"].bool()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in mixed.items()}
    logits = model(**inputs).logits
    assert logits.dtype == dtype
    difference = (logits.float() - full(**mixed).logits)[real][:, :1200].abs().max()
    assert difference < (0.15 if dtype == torch.bfloat16 else 0.02)
    assert len(new_ids(model, inputs)) == 3


def test_save_load_and_shards_are_bit_exact(model, tmp_path, mixed):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    again = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name
    assert torch.equal(again(**mixed).logits, model(**mixed).logits)
    assert again.generation_config.stop_sequences == [[300, 1157]]
    assert again.model.vision_tower.post_layernorm.eps == 1e-5


def test_state_dict_keys_stay_under_two_prefixes(model):
    assert {key.split(".")[0] for key in model.state_dict()} == {"model", "lm_head"}


def test_device_map(tiny_checkpoint, mixed, model, tmp_path):
    parts = ("model.vision_tower", "model.query_tokens", "model.qformer", "model.multi_modal_projector", "lm_head")
    places = {**dict.fromkeys(parts, "cpu"), "model.language_model": "disk"}
    offloaded = AutoModelForImageTextToText.from_pretrained(
        tiny_checkpoint, device_map=places, offload_folder=tmp_path
    )
    assert offloaded.model.language_model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(offloaded(**mixed).logits, model(**mixed).logits)
    assert new_ids(offloaded, mixed) == new_ids(model, mixed)


def test_saved_half_precision_comes_back_as_it_was(tiny_checkpoint, tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        half = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=dtype)
        half.save_pretrained(tmp_path / str(dtype))
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / str(dtype))
        assert again.dtype == again.lm_head.weight.dtype == dtype
        assert all(torch.equal(a, b) for a, b in zip(half.state_dict().values(), again.state_dict().values()))


def test_placeholders_in_the_labels_are_not_learned(model, mixed):
    labels = mixed["input_ids"].masked_fill(mixed["attention_mask"] == 0, -100)
    loss = model(**mixed, labels=labels).loss
    torch.testing.assert_close(loss, model(**mixed, labels=labels.masked_fill(labels == 1200, -100)).loss)
    assert loss.isfinite()


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gpt_neox"])
def test_tied_embeddings_of_any_name(name, tmp_path):
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}}
    sizes = {"vocab_size": 50} if name == "gpt2" else sizes
    text = AutoConfig.for_model(name, tie_word_embeddings=True, **sizes, **more.get(name, {}))
    model = MiniGPT4ForConditionalGeneration(tiny_config(text_config=text)).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path)
    ids, pixels = torch.tensor([[1, *[49] * 5, 3]]), torch.randn(1, 3, 28, 28)
    assert torch.equal(model(ids, pixel_values=pixels).logits, again(ids, pixel_values=pixels).logits)
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_serving_contract(model):
    base = model.model
    assert model.get_encoder("image") is base.vision_tower and model.get_decoder() is base.language_model
    assert model._supports_attention_backend and model.base_model is base
    assert any("language_model.layers.*.self_attn.q_proj" in key for key in model.tp_plan)
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    assert type(MiniGPT4Model._from_config(model.config)) is MiniGPT4Model


def test_dtype_where_the_embeddings_are_views(model):
    """FSDP replaces parameters with views of its own flat ones while it computes."""
    embeddings = model.get_input_embeddings()
    view = embeddings.weight.detach().bfloat16()
    del embeddings.weight
    embeddings.weight = view
    assert model.dtype == torch.bfloat16


def test_growing_the_vocabulary(model, mixed):
    before = model(**mixed).logits
    model.resize_token_embeddings(1210)
    assert model.config.text_config.vocab_size == 1210
    torch.testing.assert_close(model(**mixed).logits[..., :1201], before)


@pytest.mark.parametrize(
    "kwargs,tokens,width",
    [
        ({}, 5, 16),
        ({"projector_layers": 3}, 5, 16),
        ({"projector_layers": 3, "projector_hidden_act": "gelu"}, 5, 16),
        ({"qformer_config": None}, 4, 96),
        ({"qformer_config": None, "vision_config": {"image_size": 56, "patch_size": 7, "hidden_size": 24,
          "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32}}, 16, 96),
    ],
)  # fmt: skip
def test_variants(kwargs, tokens, width):
    config = tiny_config(**kwargs)
    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration(config).eval()
    size = config.vision_config.image_size
    features = model.get_image_features(torch.randn(2, 3, size, size))
    assert features.pooler_output.shape == (2, tokens, 32) == (2, config.image_seq_length, 32)
    assert model.model.multi_modal_projector.linear_1.in_features == width
    ids = torch.tensor([[1] + [49] * tokens + [5, 6]])
    loss = model(ids, pixel_values=torch.randn(1, 3, size, size), labels=ids.masked_fill(ids == 49, -100)).loss
    loss.backward()
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())


def test_without_qformer_four_consecutive_patches_become_one_token():
    model = MiniGPT4ForConditionalGeneration(tiny_config(qformer_config=None)).eval()
    features = model.get_image_features(torch.randn(1, 3, 28, 28))
    first = features.last_hidden_state[0, 1:5].reshape(-1)  # behind the class token
    torch.testing.assert_close(features.pooler_output[0, 0], model.model.multi_modal_projector(first))


@pytest.mark.parametrize("tower", [SiglipVisionConfig, CLIPVisionConfig, DINOv3ViTConfig])
def test_any_tower_with_any_language_model(tower):
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = Qwen3Config(vocab_size=50, head_dim=8, num_key_value_heads=2, tie_word_embeddings=True, **{
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4})  # fmt: skip
    config = tiny_config(
        vision_config=tower(image_size=28, patch_size=7, **size), text_config=text, qformer_config=None
    )
    model = MiniGPT4ForConditionalGeneration(config).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    pixels = torch.randn(2, 3, 28, 28)
    features = model.get_image_features(pixels)
    patches = features.last_hidden_state[:, -16:]
    expected = model.model.multi_modal_projector(patches.reshape(2, 4, 128))
    torch.testing.assert_close(features.pooler_output, expected)
    output = model.generate(torch.tensor([[1, *[49] * 4, 3]] * 2), pixel_values=pixels, max_new_tokens=3)
    assert output.shape[0] == 2


def test_queries_of_a_fresh_model_differ():
    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration(tiny_config())
    queries = model.model.query_tokens[0].detach()
    assert queries.std().item() == pytest.approx(0.02, rel=0.5) and not torch.equal(queries[0], queries[1])


def test_language_model_equals_the_plain_causal_model(model):
    text = LlamaForCausalLM(model.config.text_config).eval()
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = torch.tensor([[1, 20, 30, 40]])
    torch.testing.assert_close(model(ids).logits[..., :1200], text(ids).logits[..., :1200])
