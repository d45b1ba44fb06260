"""8 and 4 bits through bitsandbytes: tower and language model shrink; what learns or overflows does not."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from transformers_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration


# Sizes that the packed kernels of the CPU can take.
SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = MiniGPT4Config(
        vision_config={"image_size": 28, "patch_size": 7, "initializer_range": 0.05, **SIZE},
        qformer_config=SIZE,
        text_config={"vocab_size": 512, "initializer_range": 0.1, **SIZE},
        num_query_tokens=4,
        image_token_id=511,
    )
    folder = tmp_path_factory.mktemp("quantized") / "checkpoint"
    MiniGPT4ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options,likeness",
    [({"load_in_8bit": True}, 0.99), ({"load_in_4bit": True}, 0.9)],
)
@pytest.mark.parametrize("trained_only", [False, True])
def test_bitsandbytes(checkpoint, tmp_path, options, likeness, trained_only):
    folder = checkpoint
    full = AutoModelForImageTextToText.from_pretrained(checkpoint)
    if trained_only:
        full.requires_grad_(False)
        full.model.multi_modal_projector.requires_grad_(True)
        full.save_pretrained(tmp_path, trained_only=True)
        folder = tmp_path
    model = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    quantized = {name for name, module in model.named_modules() if type(module).__name__.startswith("Linear") and
                 type(module) is not torch.nn.Linear}  # fmt: skip
    assert any(name.startswith("model.language_model") for name in quantized)
    assert any(name.startswith("model.vision_tower") for name in quantized)
    assert not any("qformer" in name or "multi_modal_projector" in name or "lm_head" in name for name in quantized)
    assert model.model.multi_modal_projector.linear_1.weight.dtype == torch.float32

    ids, pixels = torch.tensor([[1, 511, 511, 511, 511, 5, 6]]), torch.randn(1, 3, 28, 28)
    a, b = (m(ids, pixel_values=pixels).logits[..., :511].float().flatten() for m in (full, model))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > likeness
    assert model.generate(ids, pixel_values=pixels, max_new_tokens=3, min_new_tokens=3).shape == (1, 10)

    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.save_pretrained(tmp_path / "again", trained_only=True)  # what a run on a quantized base saves
    assert torch.equal(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "again").lm_head.weight, full.lm_head.weight
    )


def test_4_bits_on_the_cpu_leave_out_layers_that_its_kernel_cannot_pack(tmp_path):
    """As in the demo's checkpoint: a tower 96 wide, where bitsandbytes packs 64 columns at once."""
    torch.manual_seed(0)
    odd = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MiniGPT4Config(
        vision_config={"image_size": 28, "patch_size": 7, **odd},
        qformer_config=odd,
        text_config={"vocab_size": 512, **SIZE},
        num_query_tokens=4,
        image_token_id=511,
    )
    MiniGPT4ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    block = "model.vision_tower.encoder.layers.0"
    assert f"{block}.mlp.fc2" in quantized and "model.language_model.layers.0.mlp.up_proj" in quantized
    assert not quantized & {f"{block}.mlp.fc1", f"{block}.self_attn.qkv", "lm_head"}
    ids, pixels = torch.tensor([[1, 511, 511, 511, 511, 5, 6]]), torch.randn(1, 3, 28, 28)
    assert model.generate(ids, pixel_values=pixels, max_new_tokens=3, min_new_tokens=3).shape == (1, 10)
