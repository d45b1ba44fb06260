"""Tiny sources in the formats of released weights, made of the golden files: what `convert` reads."""

import json
import shutil
from pathlib import Path

import torch
from golden_model import ALPHA, golden_config, golden_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
)


# What `convert_checkpoint` takes to make the golden model of the authors' files.
ORIGINAL = {
    "vision": str(ALPHA / "eva_vit_g.pth"),
    "qformer": str(ALPHA / "blip2_pretrained_flant5xxl.pth"),
    "language_model": str(ALPHA / "llm"),
    "projector": str(ALPHA / "minigpt4_stage2.pth"),
    "vision_config": {"num_attention_heads": 4},
    "qformer_config": {"num_attention_heads": 4},
}
T5_WIDTH = 32


def t5_config() -> T5Config:
    return T5Config(
        vocab_size=64, d_model=T5_WIDTH, d_kv=8, d_ff=2048, num_layers=1, num_decoder_layers=1, num_heads=4
    )


def save_t5(folder: Path) -> None:
    T5ForConditionalGeneration(t5_config()).save_pretrained(folder)


def save_blip2(golden: dict, folder: Path, shard_size: str = "150KB") -> None:
    """A BLIP-2 with the golden tower and Q-Former, and a T5 of random weights, saved by transformers."""
    ours = golden_config(golden["config"])
    config = Blip2Config(
        vision_config=ours.vision_config.to_dict(),
        qformer_config=ours.qformer_config.to_dict(),
        text_config=t5_config().to_dict(),
        num_query_tokens=ours.num_query_tokens,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    state = {
        name.removeprefix("model.").replace("vision_tower.", "vision_model."): tensor
        for name, tensor in golden_state_dict(golden["config"]).items()
        if name.startswith(("model.vision_tower.", "model.qformer.", "model.query_tokens"))
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith(("language_model.", "language_projection.")) for name in missing)
    model.save_pretrained(folder, max_shard_size=shard_size)


def to_pickles(folder: Path) -> None:
    """Turns safetensors shards into `.bin` shards, as they were before."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()
    for path in folder.glob("*.safetensors"):
        torch.save(load_file(path), path.with_name(f"pytorch_{path.stem}.bin"))
        path.unlink()


def save_modern_language_model(folder: Path, tie: bool = True, spare_rows: int = 0, context: int = 512) -> None:
    """A Qwen3 of random weights in bf16 with a byte-level tokenizer, a chat template and two ends of a turn."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["a red circle on a white background"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template="{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    fast.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(fast) + spare_rows,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=context,
        tie_word_embeddings=tie,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(folder)


def save_tower(kind: str, folder: Path) -> torch.nn.Module:
    """A tower of random weights, as a part of a two-tower model where it is one; returns the tower."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**size, "image_size": 56, "patch_size": 14}
    torch.manual_seed(2)
    if kind == "dinov3":
        model = DINOv3ViTModel(DINOv3ViTConfig(**vision, num_register_tokens=4))
    else:
        config_class, model_class = {"siglip": (SiglipConfig, SiglipModel), "clip": (CLIPConfig, CLIPModel)}[kind]
        text = {**size, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model = model_class(config_class(vision_config=vision, text_config=text))
    model.save_pretrained(folder)
    if kind == "clip":
        CLIPImageProcessorPil().save_pretrained(folder)  # crops, to another size
    else:
        SiglipImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(folder)
    return model if kind == "dinov3" else model.vision_model


def copy_llm(folder: Path, **changes) -> Path:
    """The golden language model in a folder of its own, with changes to its config."""
    shutil.copytree(ALPHA / "llm", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    edit_json(folder / "config.json", **changes)
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change) -> None:
    """Applies `change` to the state dict of a safetensors file."""
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def edit_pickle(source: Path, target: Path, change) -> Path:
    """Applies `change` to the state dict of a PyTorch file, and saves it as another."""
    loaded = torch.load(source, weights_only=True)
    change(loaded.get("model", loaded))
    torch.save(loaded, target)
    return target
