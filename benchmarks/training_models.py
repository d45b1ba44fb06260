"""Models, rows and variants of training.py: what is trained, on what, and with which optimizations."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peers import IMAGE, IMAGE_TOKEN_ID, OURS, Size, build_model
from peers import SIZES as PEER_SIZES
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BlipImageProcessorPil, LlavaProcessor, PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from transformers_minigpt4 import MiniGPT4Processor
from transformers_minigpt4.training.collator import ImageTextCollator
from transformers_minigpt4.training.features import FeatureCollator, train_from_features
from transformers_minigpt4.training.loss import LabeledCollator, keep_labeled
from transformers_minigpt4.training.packing import pack
from transformers_minigpt4.training.stages import prepare_stage


MINI = Size(
    vision={"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 3},
    qformer={"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 2},
    text={"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
    decode_tokens=1,
)
MEDIUM = Size(
    vision={"hidden_size": 288, "intermediate_size": 1152, "num_hidden_layers": 10, "num_attention_heads": 6},
    qformer={"hidden_size": 144, "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 3},
    text={"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "num_attention_heads": 8},
    decode_tokens=1,
)
SIZES = {**PEER_SIZES, "mini": MINI, "medium": MEDIUM}
TRL_LLAVA, TRL_OURS = "TRL's collator, LLaVA", "TRL's collator, MiniGPT-4"
# Each row keeps the optimizations of the one before.
PADDED, PACKED, LABELLED, CACHED = "own collator, padded", "+ packed", "+ logits at labels", "+ cached features"
VARIANTS = (TRL_LLAVA, TRL_OURS, PADDED, PACKED, LABELLED, CACHED)
IMAGE_SIZE = (320, 256)  # pixels of the JPEGs


@dataclass(frozen=True)
class Stage:
    """Lengths of rows in tokens: prompt, and mean, spread and bounds of answers; rows per batch by size of run."""

    prompt: int
    mean: float
    spread: float
    bounds: tuple[int, int]
    batch_size: int
    gpu_batch_size: int


# Captions of CC and SBU have about 11 words and the authors cut at 32 tokens; the curated texts of stage 2 have about
# 80 words, cut at 160. The spreads are ours.
STAGES = {
    "stage 1": Stage(0, 13, 6, (5, 32), 8, 64),
    "stage 2": Stage(24, 105, 30, (30, 160), 4, 12),
}


def make_tokenizer(image_token: str) -> PreTrainedTokenizerFast:
    """One token per word; the image token's id is that of the models."""
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, IMAGE_TOKEN_ID))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([image_token])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def make_processor(name: str) -> Any:
    """The processor of the model called `name`."""
    image_processor = BlipImageProcessorPil(size={"height": IMAGE["image_size"], "width": IMAGE["image_size"]})
    if name == OURS:
        return MiniGPT4Processor(image_processor, make_tokenizer("<ImageHere>"), chat_template="")
    return LlavaProcessor(
        image_processor,
        make_tokenizer("<image>"),
        patch_size=IMAGE["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def make_rows(stage: Stage, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with one JPEG each, undecoded, and words drawn at random."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        file = io.BytesIO()
        noise = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(IMAGE_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG")
        answer = int(np.clip(draw.normal(stage.mean, stage.spread), *stage.bounds))
        prompt, completion = (" ".join(f"w{n}" for n in draw.integers(3, 31999, k)) for k in (stage.prompt, answer))
        rows.append(
            {
                "images": [{"bytes": file.getvalue(), "path": None}],
                "prompt": f"<ImageHere> {prompt}".strip(),
                "completion": completion,
            }
        )
    return rows


class TRLCollator:
    """TRL's own collator, with the images decoded as `datasets` passes them to it."""

    def __init__(self, processor: Any):
        self.image_token = processor.image_token
        self.collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        decoded = []
        for row in rows:
            images = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in row["images"]]
            prompt = row["prompt"].replace("<ImageHere>", self.image_token)
            decoded.append({**row, "prompt": prompt, "images": images})
        return dict(self.collator(decoded))


class Variant:
    """
    One row of the tables: its own model, a collator, and a training step.

    Args:
        name: One of `VARIANTS`.
        size: A key of `SIZES`.
        cache: Folder of features, for the variant that uses them.
        device: `cpu` or `cuda`.
        dtype: Of the frozen modules.
    """

    def __init__(self, name: str, size: str, cache: str, device: str, dtype: torch.dtype):
        self.name = name
        self.device = device
        # Without Triton, TRL's head scores every position that it is given, and transformers' own loss is faster.
        self.fused = device == "cuda" or name not in (LABELLED, CACHED)
        kind = "LLaVA" if name == TRL_LLAVA else OURS
        self.model: PreTrainedModel = build_model(kind, SIZES[size], dtype, device)
        self.processor = make_processor(kind)
        prepare_stage(self.model)
        add_fused_lm_head(self.model)  # what SFTTrainer does with every model
        self.collator = self._collator(cache)
        self.model.train()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def _collator(self, cache: str) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        if self.name in (TRL_LLAVA, TRL_OURS):
            return TRLCollator(self.processor)
        collator: Any = ImageTextCollator(self.processor)
        if self.name == CACHED:
            collator = FeatureCollator(
                collator, train_from_features(self.model, self.processor.image_processor, cache)
            )
        if self.name != PADDED:
            collator = pack(self.model, collator)
        if self.name in (LABELLED, CACHED):
            keep_labeled(self.model)
            collator = LabeledCollator(collator)
        return collator

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of one batch: TRL's fused one, as SFTTrainer computes it, or transformers' own."""
        placed = {key: value.to(self.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        return self.model(**{**placed, "use_cache": False, "fused_lm_head": self.fused}).loss

    def step(self, rows: list[dict[str, Any]]) -> float:
        """Collates, runs forward and backward, and updates; returns the loss."""
        loss = self.loss(self.collator(rows))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def necessary_flops(variant: Variant, rows: list[dict[str, Any]], encode_flops: int) -> float:
    """
    Floating-point operations that a step cannot avoid, two per multiply-add.

    Forward and gradient of the inputs of the language model for real tokens, causal attention between those of a row,
    logits and their gradient where labels are, the projector with the gradient of its weights, and one encoding of
    each image (`encode_flops`, projector included) unless it is cached. Frozen weights need no gradient.
    """
    text = variant.model.config.get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    weights = layers * (4 * width * width + 3 * width * text.intermediate_size)
    kind = "LLaVA" if variant.name == TRL_LLAVA else OURS
    each = (IMAGE["image_size"] // IMAGE["patch_size"]) ** 2 if kind == "LLaVA" else 32
    total = 0.0
    for row in rows:
        answer = len(row["completion"].split())
        length = each + len(row["prompt"].split()) - 1 + answer
        total += 2 * 2 * weights * length  # forward, backward
        total += 3 * 2 * layers * width * length * (length + 1)  # two products forward, four backward, half the square
        total += 2 * 2 * text.vocab_size * width * answer
        projector = [p for p in variant.model.base_model.multi_modal_projector.parameters() if p.ndim == 2]
        total += sum(2 * each * p.numel() for p in projector)  # gradients of its weights
        total += sum(2 * each * p.numel() for p in projector[1:])  # gradients between its layers
        total += sum(2 * each * p.numel() for p in projector) if variant.name == CACHED else encode_flops
    return total
