"""Stages change what they name, and leave every other bit, dropout and optimizer state unchanged."""

import copy

import pytest
import torch
from test_collator import golden_rows
from tiny_models import save_blip2, save_llava
from torch import nn
from transformers import AutoModelForImageTextToText
from versions import enable_gradient_checkpointing

from transformers_minigpt4.training.collator import ImageTextCollator
from transformers_minigpt4.training.stages import prepare_stage, touch_trainable


@pytest.fixture
def batch(processor, golden, pictures):
    rows, _ = golden_rows(golden, "stage2", pictures)
    return ImageTextCollator(processor)(rows)


@pytest.mark.parametrize(
    ("modules", "prefixes"),
    [
        (["projector"], ("model.multi_modal_projector.",)),
        (["projector", "qformer"], ("model.multi_modal_projector.", "model.qformer.", "model.query_tokens")),
        (["language_model"], ("model.language_model.", "lm_head.")),
    ],
)
def test_only_the_named_modules_move(model, batch, modules, prefixes):
    names = prepare_stage(model, modules)
    expected = {name: p.numel() for name, p in model.named_parameters() if name.startswith(prefixes)}
    assert names == expected and expected
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):
        model(**batch).loss.backward()
        assert all(p.grad is None for name, p in model.named_parameters() if name not in expected)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        moved = not torch.equal(value, before[name])
        if name.startswith(prefixes):
            # Embeddings of words that do not occur have no gradient, and queries' unused biases neither.
            assert moved or "bias" in name or "qformer" in name, name
        else:
            assert not moved, name
    assert len(optimizer.state) <= len(expected)


def test_frozen_modules_have_no_dropout_while_training(model, batch):
    prepare_stage(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    assert model.training and model.model.multi_modal_projector.training
    frozen = [
        m for name, m in model.named_modules() if name.startswith(("model.vision", "model.qformer", "model.lang"))
    ]
    assert frozen and not any(module.training for module in frozen)
    assert model(**batch).loss.item() == model(**batch).loss.item()
    prepare_stage(model, ["projector", "qformer"])
    model.train()
    assert model.model.qformer.training and not model.model.vision_tower.training
    assert model(**batch).loss.item() != model(**batch).loss.item()
    assert not model.eval().model.qformer.training


def test_activation_checkpointing_works_in_frozen_layers(model, batch):
    prepare_stage(model)
    model.train()
    model(**batch).loss.backward()
    plain = model.model.multi_modal_projector.linear_1.weight.grad.clone()
    model.zero_grad()
    enable_gradient_checkpointing(model)
    model.train()
    layer = model.model.language_model.layers[0]
    assert layer.training and not layer.self_attn.training
    model(**batch).loss.backward()
    torch.testing.assert_close(model.model.multi_modal_projector.linear_1.weight.grad, plain)


def test_text_only_gives_a_zero_gradient(model, processor):
    prepare_stage(model, ["projector", "qformer"])
    row = {"images": [], "prompt": "###Human: Hi. ###Assistant: ", "completion": "Hello.###"}
    batch = ImageTextCollator(processor)([row])
    before = model(**batch).loss
    assert not before.requires_grad
    for full_tower in (False, True):
        handle = touch_trainable(model, full_tower)
        loss = model(**batch).loss
        assert torch.equal(loss, before)
        loss.backward()
        weight = model.model.multi_modal_projector.linear_1.weight
        assert weight.grad is not None and not weight.grad.any()
        weight.grad = None
        handle.remove()


@pytest.mark.parametrize("full_tower", [False, True])
def test_text_only_through_llava(tmp_path, full_tower):
    save_llava(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    prepare_stage(model)
    batch = {"input_ids": torch.tensor([[1, 5, 6]]), "labels": torch.tensor([[-100, 5, 6]])}
    before = model(**batch).loss
    touch_trainable(model, full_tower)
    loss = model(**batch).loss
    loss.backward()
    assert torch.equal(loss, before) and not model.model.multi_modal_projector.linear_1.weight.grad.any()


@pytest.mark.parametrize(("save", "count"), [(save_llava, 4), (save_blip2, 2)])
def test_other_architectures(save, count, tmp_path):
    save(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    names = prepare_stage(model)
    assert len(names) == count and all("project" in name for name in names)


def test_bad_modules(model):
    with pytest.raises(ValueError, match="eyes"):
        prepare_stage(model, ["eyes"])
    with pytest.raises(ValueError, match="nothing"):
        prepare_stage(model, [])
    with pytest.raises(ValueError, match="exclude each other"):
        prepare_stage(model, ["lora", "language_model"])
    model.model.qformer = model.model.query_tokens = None
    with pytest.raises(ValueError, match="has no qformer"):
        prepare_stage(model, ["qformer"])
