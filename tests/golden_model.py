"""Builds our model from the golden files, which have exactly the formats in which the authors released weights."""

from pathlib import Path

import torch
from transformers import AutoConfig

from transformers_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from transformers_minigpt4.conversion.compose import mapped
from transformers_minigpt4.conversion.key_maps import EMBEDDING, HEAD, LANGUAGE_MODEL
from transformers_minigpt4.conversion.sources import SubModel, open_projector, open_qformer, open_vision_tower
from transformers_minigpt4.conversion.weights import open_weights


GOLDEN = Path(__file__).parent / "golden"
ALPHA = GOLDEN / "alpha"


def _vision_tower(raw: dict) -> SubModel:
    heads = {"num_attention_heads": raw["vit"]["num_heads"]}
    return open_vision_tower(str(ALPHA / "eva_vit_g.pth"), None, heads)


def _qformer(raw: dict) -> SubModel:
    heads = {"num_attention_heads": raw["qformer"]["num_attention_heads"]}
    return open_qformer(str(ALPHA / "blip2_pretrained_flant5xxl.pth"), raw["vit"]["embed_dim"], heads, seed=0)[0]


def golden_config(raw: dict, *, image_token_id: int = 1200) -> MiniGPT4Config:
    text_config = AutoConfig.from_pretrained(ALPHA / "llm")
    # The authors' prompts open with the tokenizer's <s>, whatever the config of the language model says.
    text_config.vocab_size, text_config.bos_token_id = image_token_id + 1, 1
    text_config.eos_token_id, text_config.pad_token_id = 2, 0
    return MiniGPT4Config(
        vision_config=_vision_tower(raw).config,
        qformer_config=_qformer(raw).config,
        text_config=text_config,
        num_query_tokens=raw["qformer"]["num_query_token"],
        image_token_id=image_token_id,
    )


def golden_state_dict(raw: dict) -> dict[str, torch.Tensor]:
    pieces = {
        **_vision_tower(raw).pieces,
        **_qformer(raw).pieces,
        **open_projector(str(ALPHA / "minigpt4_stage2.pth")).pieces,
        **mapped(open_weights(str(ALPHA / "llm")), LANGUAGE_MODEL),
    }
    state = {name: piece.read().float() for name, piece in pieces.items()}
    for name in (EMBEDDING, HEAD):  # one row more for the image token
        state[name] = torch.cat([state[name], torch.ones(1, state[name].shape[1])])
    return state


def golden_model(raw: dict) -> MiniGPT4ForConditionalGeneration:
    model = MiniGPT4ForConditionalGeneration(golden_config(raw))
    model.load_state_dict(golden_state_dict(raw), strict=True)
    return model.eval()
