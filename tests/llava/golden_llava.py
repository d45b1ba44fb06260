"""Builds LLaVA from the files of `tests/llava_golden`, and reads what the authors' code gave."""

import json
import os
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from transformers_minigpt4 import LlavaLinearConfig, LlavaLinearForConditionalGeneration


# Another set of the same kind can be tested in place of the one that is here.
GOLDEN = Path(os.environ.get("LLAVA_GOLDEN", Path(__file__).parent.parent / "llava_golden"))
IMAGE_MARK = -200  # one image in the authors' ids
IGNORED = -100


@cache
def recorded(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@cache
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


def image(name: str) -> Image.Image:
    return Image.open(GOLDEN / "images" / name)


def our_name(name: str) -> str:
    """What a parameter of the authors' is called in ours."""
    for theirs, ours in (
        ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
        ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
        ("model.mm_projector.", "model.multi_modal_projector."),
        ("model.", "model.language_model."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def build(projector: str, **changes: object) -> PreTrainedModel:
    """The model with a projector of the authors', `linear` or `mlp2x_gelu`, and the image token as its last token."""
    text = LlamaConfig.from_pretrained(GOLDEN / "linear")
    image_token_id = text.vocab_size
    text.vocab_size += 1
    linear = projector == "linear"
    config_class = LlavaLinearConfig if linear else LlavaConfig
    config = config_class(
        vision_config=CLIPVisionConfig.from_pretrained(GOLDEN / "clip"),
        text_config=text,
        image_token_index=image_token_id,
        **{"image_seq_length": 16, **changes},
    )
    model = (LlavaLinearForConditionalGeneration if linear else LlavaForConditionalGeneration)(config)
    state = {
        name: value for name, value in load_file(GOLDEN / "linear" / "model.safetensors").items() if "mm_" not in name
    }
    state |= torch.load(GOLDEN / projector / "mm_projector.bin", weights_only=True)
    state = {our_name(name): value for name, value in state.items()}
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.zeros(1, state[name].shape[1])])
    model.load_state_dict(state, strict=True)
    return model.eval()


def expanded(values: torch.Tensor, ids: torch.Tensor, length: int, image_token_id: int | None) -> torch.Tensor:
    """Ids or labels with `length` positions for each image mark in `ids`; labels have -100 there."""
    rows = []
    for row, marks in zip(values.long(), ids):
        repeats = torch.where(marks == IMAGE_MARK, length, 1)
        row = torch.where(marks == IMAGE_MARK, IGNORED if image_token_id is None else image_token_id, row)
        rows.append(row.repeat_interleave(repeats))
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=IGNORED if image_token_id is None else 0
    )
