"""Loading for inference: quantized with bitsandbytes, and PEFT adapters."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import drawn_image
from transformers import AutoModelForImageTextToText

from transformers_minigpt4.inference import loading
from transformers_minigpt4.inference.generation import caption_images
from transformers_minigpt4.inference.loading import load_model_and_processor


GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tmp_path_factory):
    """What PEFT saves: no processor."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, config).save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize("quantization,layer", [("bnb-4bit", "Linear4bit"), ("bnb-8bit", "Linear8bitLt")])
def test_quantization(tiny_checkpoint, adapter, tmp_path, quantization, layer):
    model, processor = load_model_and_processor(tiny_checkpoint, device="cpu", quantization=quantization)
    quantized = [name for name, module in model.named_modules() if type(module).__name__ == layer]
    assert any(name.startswith("model.language_model") for name in quantized)
    assert not any("qformer" in name or "multi_modal_projector" in name or "lm_head" in name for name in quantized)
    answer = caption_images([drawn_image(1)], model, processor, **GREEDY)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for again in (None, quantization):  # the checkpoint knows how it is quantized
        loaded = load_model_and_processor(str(tmp_path), device="cpu", quantization=again)
        assert caption_images([drawn_image(1)], *loaded, **GREEDY) == answer
    other = "bnb-8bit" if quantization == "bnb-4bit" else "bnb-4bit"
    with pytest.raises(ValueError, match=f"quantized in another way already, and cannot be in {other}"):
        load_model_and_processor(str(tmp_path), device="cpu", quantization=other)

    adapted, _ = load_model_and_processor(adapter, device="cpu", quantization=quantization)
    names = dict(adapted.named_modules())
    assert any("lora_A" in name for name in names) and any(type(part).__name__ == layer for part in names.values())


def test_quantization_that_cannot_be(tiny_checkpoint, monkeypatch):
    with pytest.raises(ValueError, match="no quantization 'gptq'; choose from bnb-4bit, bnb-8bit"):
        load_model_and_processor(tiny_checkpoint, quantization="gptq")
    with pytest.raises(ValueError, match="cannot quantize on the device 'meta', only on cpu, "):
        load_model_and_processor(tiny_checkpoint, device="meta", quantization="bnb-4bit")
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="needs the package bitsandbytes; install it with `pip install bitsandbytes`"):
        load_model_and_processor(tiny_checkpoint, quantization="bnb-4bit")


def test_an_adapter_without_processor_takes_its_base_s(tiny_checkpoint, adapter, tmp_path):
    model, processor = load_model_and_processor(adapter, device="cpu")
    base, own = load_model_and_processor(tiny_checkpoint, device="cpu")
    assert processor.chat_template == own.chat_template
    inputs = own(images=[drawn_image(1)], text="<Img><ImageHere></Img> What?", return_tensors="pt")
    assert not torch.equal(model(**inputs).logits, base(**inputs).logits)

    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(ValueError, match=r"adapter_config\.json names no base_model_name_or_path"):
        load_model_and_processor(str(tmp_path), device="cpu")
