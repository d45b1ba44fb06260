"""Whether a model sees: captions must be likelier with their own images than with others."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from transformers_minigpt4.data.readers import RawRow
from transformers_minigpt4.data.sources import open_reader, parse_source
from transformers_minigpt4.processing.image_utils_minigpt4 import load_image

from .checks import Check, Model, Processor


EMOJI, SHAPES = "emoji", "shapes"  # the sets in `captioned_images/`
MAX_IMAGES = 32
_MIN_IMAGES = 6  # 720 orders, so that p can be below the level
# Two kinds of prompt are tried, so one model in a hundred that sees nothing passes.
_LEVEL = 0.005
_ORDERS = 9999
# Share of the drawn shapes whose own caption must come first, for a model that knows nothing else. The demo's four
# variants have 0.94 or more after either stage.
_SHAPES_RIGHT = 0.75
_REQUEST = "Describe the image in detail."


@dataclass(frozen=True)
class Captioned:
    """An image with a caption as web pages have them, and the same as an answer in a chat."""

    image: Image.Image
    caption: str
    answer: str


@dataclass(frozen=True)
class Match:
    """How well captions fit their own images: `margin` in nats a caption, `right` of `count` come first."""

    prompt: str
    margin: float
    right: int
    count: int
    p: float

    def __str__(self) -> str:
        p = f"p = {self.p:.2g}" if self.p > 1 / (_ORDERS + 1) else f"p < {1 / _ORDERS:.0e}"
        return (
            f"own caption first for {self.right} of {self.count} images; own images lower its loss by "
            f"{self.margin:.2f} ({p}, {self.prompt})"
        )


def bundled(name: str) -> list[Captioned]:
    """A set of captioned images of this package: `EMOJI` or `SHAPES`."""
    folder = Path(__file__).with_name("captioned_images") / name
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    return [Captioned(load_image(folder / row["file_name"]), row["caption"], row["answer"]) for row in rows]


def own_images(source: str) -> list[Captioned]:
    """
    The first captioned images of a source of rows, such as a folder with `metadata.jsonl` or a JSON Lines file.

    Raises:
        ValueError: for a source without captioned images, or with too few.
    """
    reader = open_reader(parse_source(source))
    found: list[Captioned] = []
    for row in (row for shard in range(reader.num_shards) for row in reader.read(shard, None)):
        if len(found) == MAX_IMAGES:
            break
        if isinstance(row, RawRow) and row.caption and row.images:
            image = row.images[0]
            found.append(Captioned(load_image(image["path"] or image["bytes"]), row.caption, row.caption))
    if len(found) < _MIN_IMAGES:
        raise ValueError(
            f"{source} has {len(found)} captioned images; {_MIN_IMAGES} or more are needed to tell sight from chance"
        )
    return found


def caption_losses(
    model: Model,
    processor: Processor,
    features: torch.Tensor,
    prompt: str,
    captions: Sequence[str],
) -> torch.Tensor:
    """
    Losses of captions, summed over their tokens, after a prompt with one image.

    Args:
        model: The model.
        processor: Its processor.
        features: Projected features `(N, K, D)`.
        prompt: Text with one image token.
        captions: M texts.

    Returns:
        `torch.Tensor`: `(N, M)`, in nats.
    """
    tokenizer, embed = processor.tokenizer, model.get_input_embeddings()
    places = prompt.replace(processor.image_token, processor.image_token * features.shape[1])
    start = tokenizer.encode(places, add_special_tokens=False)
    losses = []
    for caption in captions:
        target = tokenizer.encode(caption, add_special_tokens=False)
        ids = torch.tensor([start + target], device=model.device)
        embeddings = embed(ids).repeat(len(features), 1, 1)
        embeddings[:, ids[0] == model.config.image_token_id] = features.to(embeddings)
        logits = model(inputs_embeds=embeddings, logits_to_keep=len(target) + 1).logits[:, :-1].float()
        labels = ids[:, len(start) :].expand(len(features), -1).to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        losses.append(loss.sum(dim=1).cpu())
    return torch.stack(losses, dim=1)


def match(losses: torch.Tensor, prompt: str = "") -> Match:
    """
    Compares losses `(N, N)` of captions (columns) with their own images and with the others.

    The mean of each column is subtracted, so that likely captions do not win. p is the share of random assignments of
    captions to images that fit as well as the right one (a permutation test).
    """
    count = len(losses)
    relative = losses.double() - losses.double().mean(dim=0, keepdim=True)
    own = relative.diagonal().mean()
    draw = torch.Generator().manual_seed(0)
    orders = torch.rand(_ORDERS, count, generator=draw).argsort(dim=1)
    others = relative[torch.arange(count), orders].mean(dim=1)
    p = (1 + int((others <= own + 1e-9).sum())) / (1 + _ORDERS)
    right = int((relative.argmin(dim=1) == torch.arange(count)).sum())
    return Match(prompt, -own.item() * count / (count - 1), right, count, p)


def check_captions(
    model: Model,
    processor: Processor,
    knows_only_shapes: bool,
    images: list[Captioned] | None = None,
) -> Check:
    """Tries the format of stage 1, no prompt, and that of the chat template; the better one counts."""
    chosen = "own images" if images else SHAPES if knows_only_shapes else EMOJI
    rows = images or bundled(chosen)
    features = features_of(model, processor, [row.image for row in rows])
    matches = []
    for kind, prompt, captions in _prompts(processor, rows):
        losses = caption_losses(model, processor, features, prompt, captions)
        if not bool(torch.isfinite(losses).all()):
            return Check("captions", "fail", "losses with inf or nan", "load with bfloat16 or float32")
        matches.append(match(losses, kind))
        needed = _SHAPES_RIGHT * len(rows) if chosen == SHAPES else 0
        if matches[-1].p < _LEVEL and matches[-1].right >= needed:
            break
    best = max(matches, key=lambda found: (found.right, -found.p))
    detail = f"{chosen}: {best}"
    if best.p >= _LEVEL or best.right < needed:
        advice = (
            "the answers do not depend on the images as they should: vision tower, Q-Former or projector is wrong, or "
            "of another model" + ("" if images else "; for images of another kind, pass captioned ones with --images")
        )
        return Check("captions", "fail", detail, advice)
    return Check("captions", "ok", detail)


def _prompts(processor: Processor, rows: list[Captioned]) -> list[tuple[str, str, list[str]]]:
    bos = processor.tokenizer.bos_token or ""
    prompts = [("without a prompt", bos + processor.image_token, [row.caption + "\n" for row in rows])]
    message: Any = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _REQUEST}]}
    try:
        chat = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    except Exception:  # a template that takes no such message; the format of stage 1 is left
        return prompts
    if chat.count(processor.image_token) == 1:
        prompts.append(("chat template", chat, [row.answer for row in rows]))
    return prompts


def features_of(model: Model, processor: Processor, images: list[Image.Image]) -> torch.Tensor:
    """Projected features of images, `(N, K, D)`."""
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    features = model.get_image_features(for_tower(model, pixels))["pooler_output"]
    return features if isinstance(features, torch.Tensor) else torch.stack(list(features))  # LLaVA gives a list


def for_tower(model: Model, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels with the dtype and on the device of the vision tower."""
    first = next(model.get_submodule("model.vision_tower").parameters())
    return pixels.to(first.device, first.dtype if first.is_floating_point() else model.dtype)


__all__ = [
    "EMOJI",
    "SHAPES",
    "Captioned",
    "Match",
    "bundled",
    "check_captions",
    "features_of",
    "for_tower",
    "match",
    "own_images",
]
