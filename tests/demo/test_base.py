"""The shipped frozen modules: the tokenizer's LLaMA-1 behavior, sizes, and what tower and language model can do."""

import random

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from transformers_minigpt4.demo.make_language import Example, Writer, collate
from transformers_minigpt4.demo.make_vision import make_images, normalize
from transformers_minigpt4.demo.run import BASE, build_model
from transformers_minigpt4.demo.scoring import right_attributes
from transformers_minigpt4.demo.texts import INSTRUCTIONS, STAGE_2_TEMPLATE
from transformers_minigpt4.demo.world import held_out_scenes, training_scenes


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE / "language_model")


@pytest.fixture(scope="module")
def language_model():
    return LlamaForCausalLM.from_pretrained(BASE / "language_model", dtype=torch.float32).eval()


def pieces(tokenizer, text, **kwargs):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **kwargs)["input_ids"])


def test_fixed_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>", "<0x0A>", "<0xFF>"]) == [
        0,
        1,
        2,
        3,
        13,
        258,
    ]
    assert tokenizer.convert_tokens_to_ids("<ImageHere>") == len(tokenizer) - 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


def test_every_segment_has_its_own_prefix(tokenizer):
    tokens = pieces(tokenizer, "###Human: <Img><ImageHere></Img> What is it? ###Assistant: ")
    assert tokens[:3] == ["<s>", "▁###", "Human"]
    image = tokens.index("<ImageHere>")
    assert tokens[image + 1].startswith("▁")
    assert tokens[-4:] == ["▁###", "Assistant", ":", "▁"]
    assert pieces(tokenizer, "The star", add_special_tokens=False) == ["▁The", "▁star"]


def test_the_stop_string_is_one_piece_or_two(tokenizer):
    assert pieces(tokenizer, "###", add_special_tokens=False) == ["▁###"]
    assert pieces(tokenizer, "star.###", add_special_tokens=False)[-3:] == [".", "##", "#"]


def test_what_no_piece_covers_falls_back_to_bytes(tokenizer):
    text = "a star\nst\u00e4r \u661f"
    assert "<0x0A>" in pieces(tokenizer, text)
    assert "<unk>" not in pieces(tokenizer, text)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_saving_keeps_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: A ring.###"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_they_are_small():
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 4e6


def test_query_outputs_tell_held_out_images_apart():
    """A linear classifier fitted on shown combinations names the attributes of held-out ones."""
    model = build_model()[0].model

    def vision(pixels):
        patches = model.vision_tower(pixel_values=pixels).last_hidden_state
        queries = model.query_tokens.expand(len(patches), -1, -1)
        return model.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state

    with torch.no_grad():
        pixels, words = make_images(training_scenes(), 691, seed=5)
        features = torch.cat([vision(normalize(chunk)) for chunk in pixels.split(100)]).flatten(1)
        held_out_pixels, held_out_words = make_images(held_out_scenes(), 173, seed=6)
        held_out = torch.cat([vision(normalize(chunk)) for chunk in held_out_pixels.split(100)]).flatten(1)
    for attribute in range(words.shape[1]):
        targets = torch.nn.functional.one_hot(words[:, attribute]).float()
        ridge = features.T @ features + 10.0 * torch.eye(features.shape[1])
        weights = torch.linalg.solve(ridge, features.T @ targets)
        right = (held_out @ weights).argmax(-1) == held_out_words[:, attribute]
        assert right.float().mean() > 0.9, attribute


def test_language_model_describes_what_a_list_holds(tokenizer, language_model):
    writer = Writer(tokenizer, random.Random(0))
    scenes = writer.rng.sample(held_out_scenes(), 16)
    before, after = STAGE_2_TEMPLATE.format(image="\0", text=INSTRUCTIONS[0]).split("\0")
    examples = [writer.example(before, writer.slots(list(scene.words)), after, "") for scene in scenes]
    ids = collate([Example(example.ids, example.slots, 0) for example in examples])["input_ids"]
    with torch.no_grad():
        output = language_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
    texts = [text.split("###")[0] for text in tokenizer.batch_decode(output[:, ids.shape[1] :])]
    right = [sum(right_attributes(text, scene).values()) for text, scene in zip(texts, scenes)]
    assert sum(right) >= 0.95 * 4 * len(scenes), texts


def test_model_holds_them_and_only_the_projector_depends_on_the_seed(language_model):
    first, _ = build_model(seed=0)
    second, _ = build_model(seed=1)
    states = first.state_dict(), second.state_dict()
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed == {"model.multi_modal_projector.linear_1.weight"}
    assert torch.equal(states[0]["lm_head.weight"], language_model.lm_head.weight)
