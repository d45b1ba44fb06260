"""Builds our model from the golden files, which have exactly the formats in which the authors released weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, Blip2QFormerConfig, Blip2VisionConfig

from transformers_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration


GOLDEN = Path(__file__).parent / "golden"
ALPHA = GOLDEN / "alpha"


def golden_config(raw: dict, *, image_token_id: int = 1200) -> MiniGPT4Config:
    vit, qformer = raw["vit"], raw["qformer"]
    text_config = AutoConfig.from_pretrained(ALPHA / "llm")
    # The authors' prompts open with the tokenizer's <s>, whatever the config of the language model says.
    text_config.vocab_size, text_config.bos_token_id = image_token_id + 1, 1
    text_config.eos_token_id, text_config.pad_token_id = 2, 0
    return MiniGPT4Config(
        vision_config=Blip2VisionConfig(
            hidden_size=vit["embed_dim"],
            intermediate_size=int(vit["embed_dim"] * vit["mlp_ratio"]),
            num_hidden_layers=vit["depth"],
            num_attention_heads=vit["num_heads"],
            image_size=vit["image_size"],
            patch_size=vit["patch_size"],
        ),
        qformer_config=Blip2QFormerConfig(
            hidden_size=qformer["hidden_size"],
            intermediate_size=qformer["intermediate_size"],
            num_hidden_layers=qformer["num_hidden_layers"],
            num_attention_heads=qformer["num_attention_heads"],
            encoder_hidden_size=vit["embed_dim"],
        ),
        text_config=text_config,
        num_query_tokens=qformer["num_query_token"],
        image_token_id=image_token_id,
    )


def golden_state_dict(raw: dict) -> dict[str, torch.Tensor]:
    eva = torch.load(ALPHA / "eva_vit_g.pth", weights_only=True)
    blip2 = torch.load(ALPHA / "blip2_pretrained_flant5xxl.pth", weights_only=True)["model"]
    minigpt4 = torch.load(ALPHA / "minigpt4_stage2.pth", weights_only=True)["model"]
    state = {}

    tower = "model.vision_tower."
    state[tower + "embeddings.class_embedding"] = eva["cls_token"]
    state[tower + "embeddings.position_embedding"] = eva["pos_embed"]
    for part in ("weight", "bias"):
        state[tower + f"embeddings.patch_embedding.{part}"] = eva[f"patch_embed.proj.{part}"]
        state[tower + f"post_layernorm.{part}"] = blip2[f"ln_vision.{part}"]
    for i in range(raw["vit"]["depth"]):
        block, layer = f"blocks.{i}.", tower + f"encoder.layers.{i}."
        bias = eva[block + "attn.q_bias"]
        state[layer + "self_attn.qkv.bias"] = torch.cat([bias, torch.zeros_like(bias), eva[block + "attn.v_bias"]])
        state[layer + "self_attn.qkv.weight"] = eva[block + "attn.qkv.weight"]
        for part in ("weight", "bias"):
            state[layer + f"self_attn.projection.{part}"] = eva[block + f"attn.proj.{part}"]
            state[layer + f"layer_norm1.{part}"] = eva[block + f"norm1.{part}"]
            state[layer + f"layer_norm2.{part}"] = eva[block + f"norm2.{part}"]
            state[layer + f"mlp.fc1.{part}"] = eva[block + f"mlp.fc1.{part}"]
            state[layer + f"mlp.fc2.{part}"] = eva[block + f"mlp.fc2.{part}"]

    state["model.query_tokens"] = blip2["query_tokens"]
    for key, tensor in blip2.items():
        if key.startswith("Qformer.bert.embeddings.LayerNorm."):
            state["model.qformer.layernorm." + key.rsplit(".", 1)[1]] = tensor
        elif key.startswith("Qformer.bert.encoder."):
            name = key.removeprefix("Qformer.bert.").replace("attention.self.", "attention.attention.")
            state["model.qformer." + name] = tensor

    for part in ("weight", "bias"):
        state[f"model.multi_modal_projector.linear_1.{part}"] = minigpt4[f"llama_proj.{part}"]

    for key, tensor in load_file(ALPHA / "llm" / "model.safetensors").items():
        if "rotary_emb.inv_freq" in key:
            continue
        if key in ("model.embed_tokens.weight", "lm_head.weight"):  # one row more for the image token
            tensor = torch.cat([tensor, torch.ones(1, tensor.shape[1])])
        state["lm_head.weight" if key.startswith("lm_head") else "model.language_model." + key[6:]] = tensor
    return {key: tensor.float() for key, tensor in state.items()}


def golden_model(raw: dict) -> MiniGPT4ForConditionalGeneration:
    model = MiniGPT4ForConditionalGeneration(golden_config(raw))
    model.load_state_dict(golden_state_dict(raw), strict=True)
    return model.eval()
