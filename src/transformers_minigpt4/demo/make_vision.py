"""Trains the demo's vision tower and Q-Former with throwaway classifiers, ahead of time and without any text."""

import math
import random

import numpy as np
import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .world import COLOURS, COLUMNS, IMAGE_SIZE, ROWS, SHAPES, SIZES, Scene, draw, held_out_scenes, training_scenes


NUM_QUERY_TOKENS = 8
POST_LAYERNORM_EPS = 1e-5  # what MiniGPT4Config gives the LayerNorm behind the tower
_VALUES = (tuple(COLOURS), SHAPES, tuple(SIZES), ROWS, COLUMNS)
# Which of the five words (colour, shape, size, row, column) each query's throwaway classifier names.
_WORD_OF_QUERY = (0, 0, 1, 1, 2, 2, 3, 4)

VISION_CONFIG = Blip2VisionConfig(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=IMAGE_SIZE,
    patch_size=8,
    initializer_range=0.08,  # the class's own 1e-10 suits loading weights, not training
)
QFORMER_CONFIG = Blip2QFormerConfig(
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    encoder_hidden_size=96,
    initializer_range=0.08,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    vocab_size=1,
    max_position_embeddings=1,
)


class VisionModules(nn.Module):
    """Tower, learned queries and Q-Former, with the shapes and the post-LayerNorm of the model that will use them."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = Blip2VisionModel(VISION_CONFIG)
        self.vision_tower.post_layernorm.eps = POST_LAYERNORM_EPS
        self.qformer = Blip2QFormerModel(QFORMER_CONFIG)
        self.query_tokens = nn.Parameter(torch.randn(1, NUM_QUERY_TOKENS, QFORMER_CONFIG.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels `(N, 3, 64, 64)` to query outputs `(N, 8, 96)`."""
        patches = self.vision_tower(pixel_values=pixel_values).last_hidden_state
        queries = self.query_tokens.expand(len(patches), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state


def make_images(scenes: list[Scene], count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(count, 3, 64, 64)` of bytes and the indices `(count, 5)` of their words, scenes drawn evenly."""
    rng = random.Random(seed)
    pixels = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    words = np.empty((count, len(_VALUES)), dtype=np.int64)
    for i in range(count):
        scene = scenes[i % len(scenes)]
        pixels[i] = np.asarray(draw(scene, rng))
        words[i] = [values.index(word) for values, word in zip(_VALUES, scene.words)]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(words)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes to CLIP's scale, as the demo's image processor does it."""
    mean = torch.tensor(OPENAI_CLIP_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD).view(1, 3, 1, 1)
    return (pixels / 255.0 - mean) / std


def train_vision(
    steps: int = 4000, batch: int = 64, lr: float = 1.5e-3, pool: int = 16384, seed: int = 0
) -> VisionModules:
    """
    Trains tower, queries and Q-Former until each query's output names its attribute through a linear layer.

    Returns:
        `VisionModules`: the trained modules in fp32; the linear classifiers are thrown away.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vision = VisionModules()
    heads = nn.ModuleList(nn.Linear(QFORMER_CONFIG.hidden_size, len(_VALUES[word])) for word in _WORD_OF_QUERY)
    pixels, words = make_images(training_scenes(), pool, seed + 1)
    with torch.no_grad():
        # Positions that start at the scale of what they are added to halve the steps that place and shape need.
        embeddings = vision.vision_tower.embeddings
        embeddings.position_embedding.normal_(std=embeddings.patch_embedding(normalize(pixels[:64])).std().item())
    parameters = [*vision.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, 200, steps))
    for step in range(steps):
        rows = torch.tensor([rng.randrange(pool) for _ in range(batch)])
        images = normalize(pixels[rows].float() * (1 + 0.06 * torch.randn(batch, 3, 1, 1)))
        images = images.roll((rng.randint(-1, 1), rng.randint(-1, 1)), dims=(2, 3)) + 0.03 * torch.randn_like(images)
        outputs = vision(images)
        losses = [
            nn.functional.cross_entropy(head(outputs[:, query]), words[rows, word])
            for query, (head, word) in enumerate(zip(heads, _WORD_OF_QUERY))
        ]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"vision step {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            shares = [f"{share:.3f}" for share in _classified(vision, heads, held_out_scenes(), seed + 2)]
            print(f"vision step {step + 1}: held-out right per query {' '.join(shares)}", flush=True)
    return vision.eval()


def warmup_cosine(step: int, warmup: int, steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def _classified(vision: VisionModules, heads: nn.ModuleList, scenes: list[Scene], seed: int) -> list[float]:
    """Share of images whose word each query's classifier names."""
    pixels, words = make_images(scenes, 4 * len(scenes), seed)
    outputs = torch.cat([vision(normalize(chunk)) for chunk in pixels.split(173)])
    return [
        (head(outputs[:, query]).argmax(-1) == words[:, word]).float().mean().item()
        for query, (head, word) in enumerate(zip(heads, _WORD_OF_QUERY))
    ]
