"""Packed rows, and logits where labels are, give the losses and gradients of padded batches."""

import io

import pytest
import torch
from datasets import Dataset
from test_collator import CASES, check_gradients, golden_rows
from tiny_models import LLAVA_TEMPLATE, drawn_image, save_llava, save_minigpt4
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from trl.trainer.utils import add_fused_lm_head
from versions import NO_CHECKPOINTING

from transformers_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from transformers_minigpt4.training.arguments import StageConfig
from transformers_minigpt4.training.collator import ImageTextCollator
from transformers_minigpt4.training.loss import LabeledCollator, keep_labeled
from transformers_minigpt4.training.packing import best_fit, pack
from transformers_minigpt4.training.sanity_checks import LabelsRequired, TrainingError
from transformers_minigpt4.training.stages import prepare_stage
from transformers_minigpt4.training.trainer import StageSFTTrainer, StageTrainer


MAX_TOKENS = (None, 1, 90)


def prompt(images: int, text: str, token: str = "<ImageHere>") -> str:
    return "###Human: " + f"<Img>{token}</Img> " * images + text + " ###Assistant: "


@pytest.fixture
def mixed(pictures):
    """Rows of different lengths with no, one and two images."""
    return [
        {"images": pictures[:1], "prompt": prompt(1, "What?"), "completion": "A teacher near the river.###"},
        {"images": [], "prompt": prompt(0, "Hi."), "completion": "Hello.###"},
        {"images": pictures[1:], "prompt": prompt(2, "Compare the two."), "completion": "One is red.###"},
        {"images": pictures[2:], "prompt": "<ImageHere>", "completion": "a dog\n"},
    ]


@pytest.fixture
def llava(tmp_path):
    save_llava(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    processor = LlavaProcessor.from_pretrained(tmp_path, chat_template=LLAVA_TEMPLATE)
    return model, processor


def loss_and_gradients(model, batch, fused=False):
    model.zero_grad()
    if fused:
        batch = {**batch, "fused_lm_head": True}
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
@pytest.mark.parametrize("name", CASES)
def test_golden_batches_packed(model, processor, golden, golden_tensors, pictures, name, max_tokens):
    """The authors' losses and gradients, from packed rows and logits where labels are."""
    case = golden["cases"][name]
    rows, numbers = golden_rows(golden, name, pictures)
    collator = ImageTextCollator(processor, max_completion_length=case["max_txt_len"])
    with_pixels = WithPixels(collator, golden_tensors["pixel_values"][numbers] if numbers else None)
    prepare_stage(model)
    keep_labeled(model)
    model.train()
    batch = LabeledCollator(pack(model, with_pixels, max_tokens))(rows)
    assert "attention_mask" not in batch
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    if f"{name}.grad.llama_proj.weight" in golden_tensors:
        loss.backward()
        check_gradients(model, golden_tensors, name)


class WithPixels:
    """A collator whose pixels are the golden ones."""

    def __init__(self, collator, pixels):
        self.collator, self.pixels = collator, pixels

    def __call__(self, rows):
        batch = self.collator(rows)
        return batch if self.pixels is None else {**batch, "pixel_values": self.pixels}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_mixed_rows_packed(model, processor, mixed, max_tokens, fused):
    collator = ImageTextCollator(processor)
    prepare_stage(model, ["projector", "language_model"])
    model.train()
    if fused:
        add_fused_lm_head(model)
    expected = loss_and_gradients(model, collator(mixed), fused)
    packed = pack(model, collator, max_tokens)
    check_equal(loss_and_gradients(model, packed(mixed), fused), expected)
    keep_labeled(model)
    check_equal(loss_and_gradients(model, LabeledCollator(packed)(mixed), fused), expected)
    check_equal(loss_and_gradients(model, LabeledCollator(collator)(mixed), fused), expected)
    check_equal(loss_and_gradients(model, collator(mixed), fused), expected)  # other batches are left unchanged


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_llava_packed(llava, max_tokens, fused):
    model, processor = llava
    rows = [
        {"images": [drawn_image(1)], "prompt": prompt(1, "What?", "<image>"), "completion": "A teacher.</s>"},
        {"images": [], "prompt": prompt(0, "Hi."), "completion": "Hello there, you.</s>"},
        {"images": [drawn_image(2), drawn_image(3)], "prompt": prompt(2, "And?", "<image>"), "completion": "Two.</s>"},
    ]
    collator = ImageTextCollator(processor)
    prepare_stage(model, ["projector", "language_model"])
    model.train()
    if fused:
        add_fused_lm_head(model)
    expected = loss_and_gradients(model, collator(rows), fused)
    packed = pack(model, collator, max_tokens)
    check_equal(loss_and_gradients(model, packed(rows), fused), expected)
    keep_labeled(model)
    check_equal(loss_and_gradients(model, LabeledCollator(packed)(rows), fused), expected)


def test_rows_do_not_see_each_other(model, processor, mixed):
    """A row's loss stays when its neighbors change; it would not with plain causal attention."""
    prepare_stage(model)
    packed = pack(model, ImageTextCollator(processor))
    model.train()
    batch = packed(mixed)
    other = packed([{**mixed[0], "prompt": prompt(1, "Why not?")}, *mixed[1:]])
    size, other_size = (int((b["position_ids"][0] == 0).nonzero()[1]) for b in (batch, other))
    with torch.no_grad():
        after = model(**batch).logits[:, size:]
        torch.testing.assert_close(model(**other).logits[:, other_size:], after, atol=1e-5, rtol=1e-4)
        joined = {key: value for key, value in batch.items() if key != "position_ids"}  # one plain causal sequence
        assert (model(**joined).logits[:, size:] - after).abs().max() > 1e-2


def test_packed_batches_have_no_padding(model, processor, mixed):
    collator = ImageTextCollator(processor)
    real = int(collator(mixed)["attention_mask"].sum())
    assert pack(model, collator)(mixed)["input_ids"].shape == (1, real)
    assert pack(model, collator, 90)(mixed)["input_ids"].shape[0] < len(mixed)


def test_logits_are_computed_where_labels_are(model, processor, mixed):
    collator = ImageTextCollator(processor)
    keep_labeled(model)
    batch = LabeledCollator(collator)(mixed)
    count = int((collator(mixed)["labels"][:, 1:] != -100).sum())
    assert model(**batch).logits.shape[:2] == (1, count + 1)
    assert int((batch["labels"] != -100).sum()) == count  # what trainers divide the loss by


def test_share_of_the_image_token_in_the_fused_softmax(model, processor, mixed):
    """TRL's head counts the image token: exactly log(1 + exp(z - lse)) more per position, and e^-lse for zeros."""
    with torch.no_grad():
        model.lm_head.weight[1200] = 0
    batch = ImageTextCollator(processor)(mixed)
    add_fused_lm_head(model)
    with torch.no_grad():
        output = model(**batch)
        fused = model(**batch, fused_lm_head=True).loss.item()
    logits = output.logits[:, :-1][batch["labels"][:, 1:] != -100].double()
    share = torch.nn.functional.softplus(-torch.logsumexp(logits, dim=-1)).mean().item()
    assert fused - output.loss.item() == pytest.approx(share, abs=2e-6)


def test_best_fit():
    assert best_fit([5, 9, 1, 4], 10) == [[1, 2], [0, 3]]
    assert best_fit([12, 3, 3], 10) == [[0], [1, 2]]
    assert sorted(row for rows in best_fit(list(range(1, 40)), 50) for row in rows) == list(range(39))


def test_bad_input(model, processor, mixed):
    collator = ImageTextCollator(processor)
    with pytest.raises(ValueError, match="max_tokens=0"):
        pack(model, collator, 0)
    with pytest.raises(ValueError, match="not the same number for each image"):
        pack(model, WithPixels(collator, torch.zeros(3, 3, 56, 56)))(mixed)
    with pytest.raises(TrainingError, match="nothing to learn"):
        LabelsRequired(LabeledCollator(lambda rows: {"labels": torch.full((2, 4), -100)}))(mixed)
    model.config.text_config._attn_implementation = "flash_attention_2"
    assert pack(model, collator).max_tokens is None
    with pytest.raises(ValueError, match="FlashAttention"):
        pack(model, collator, 128)
    model.config.model_type = "blip-2"
    with pytest.raises(ValueError, match="encoder-decoder"):
        pack(model, collator)


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("trainer_class", [StageSFTTrainer, StageTrainer])
def test_trainers_learn_the_same(trainer_class, tmp_path, golden, mixed):
    """Three steps of either trainer, padded and packed, with gradients accumulated over unequal batches."""
    save_minigpt4(tmp_path / "model", golden)
    rows = Dataset.from_list([{**row, "images": [encoded(image) for image in row["images"]]} for row in mixed * 4])
    weights = []
    for optimized in (False, True):
        model = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "model")
        processor = MiniGPT4Processor.from_pretrained(tmp_path / "model")
        prepare_stage(model)
        collator = ImageTextCollator(processor)
        if optimized:
            keep_labeled(model)
            collator = LabeledCollator(pack(model, collator))
        arguments = StageConfig(
            str(tmp_path / f"run-{optimized}"),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            **NO_CHECKPOINTING,
            dataloader_pin_memory=False,
        )
        trainer = trainer_class(
            model, args=arguments, train_dataset=rows, data_collator=collator, processing_class=processor
        )
        trainer.train()
        weights.append(model.model.multi_modal_projector.linear_1.weight.detach().clone())
    start = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert (weights[0] - start.model.multi_modal_projector.linear_1.weight).abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], atol=2e-5, rtol=1e-3)
