"""Checks of what a model makes of texts and images: its language, the first loss of stage 1, and its features."""

import math
from collections.abc import Iterator, Sequence

import torch
from PIL import Image, ImageDraw

from .checks import Check, Model, Processor
from .verify_captions import SHAPES, bundled, features_of, for_tower


# Ordinary English, like much of what any language model was trained on; written for this check.
SENTENCES = (
    "The weather was warm and sunny, so we decided to walk to the park after lunch.",
    "She opened the door, looked around the room, and asked if anyone had seen her keys.",
    "In the morning he drinks a cup of coffee and reads the news before going to work.",
    "The city is known for its old bridges, its large market, and the river that runs through it.",
)
# Of ln(vocabulary), the loss of a model that guesses. Trained models of 0.1 to 70 B parameters have 2 to 4 nats
# a token on such sentences, 0.2 to 0.4 of it; word frequencies alone, without any grammar, about 7 nats or 0.65.
POOR, BROKEN = 0.45, 0.65
# The authors' issues report 10.375 = ln(32000) as the first loss with broken language-model weights.
FIRST_LOSS = 0.9

_CAPTION = "a red circle on a white background"
# Relative differences of projected features: equal up to rounding, and suspiciously alike.
_SAME, _ALIKE = 1e-4, 1e-2


def check_language(model: Model, processor: Processor, sentences: Sequence[str] | None) -> tuple[Check, bool]:
    """Mean loss of plain sentences after `<s>`, and whether the model knows only texts about the demo's shapes."""
    uniform = math.log(model.config.get_text_config().vocab_size)
    english, what, poor = _loss(model, processor, SENTENCES), f"{len(sentences or SENTENCES)} sentences", POOR
    about_shapes = 0.0 if english < BROKEN * uniform else _loss(model, processor, _about_shapes())
    knows_only_shapes = 0 < about_shapes < BROKEN * uniform
    loss = english if sentences is None else _loss(model, processor, sentences)
    if knows_only_shapes:
        poor = BROKEN  # nothing announces the colors and shapes, so they are pure guessing
        if sentences is None:
            loss, what = about_shapes, "sentences about drawn shapes, all that it knows"
    detail = f"perplexity {_perplexity(loss)} on {what}; guessing gives {_perplexity(uniform)}"
    if not loss < BROKEN * uniform:
        advice = (
            "the language model's weights are wrong: a delta without its base, another version, or a broken copy; "
            "get them again (if its language is not English, pass --sentences)"
        )
        return Check("language model", "fail", detail, advice), False
    if loss > poor * uniform:
        advice = "poor for ordinary English; check that these are the right weights and, for a delta, the right base"
        return Check("language model", "warn", detail, advice), knows_only_shapes
    return Check("language model", "ok", detail), knows_only_shapes


def _about_shapes() -> list[str]:
    return [row.answer for row in bundled(SHAPES)]


def _loss(model: Model, processor: Processor, sentences: Sequence[str]) -> float:
    """Mean loss of all tokens but the first."""
    losses: list[float] = []
    for sentence in sentences:
        ids = processor.tokenizer.encode(sentence, add_special_tokens=False)
        bos = processor.tokenizer.bos_token_id
        row = torch.tensor([[*([bos] if bos is not None else []), *ids]], device=model.device)
        logits = model(input_ids=row).logits[0, :-1].float()
        losses.extend(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none").tolist())
    return sum(losses) / len(losses)


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.0f}" if loss < 50 else "beyond e^50"


def check_first_loss(model: Model, processor: Processor) -> Check:
    """Loss of a caption after an image, as in the first step of stage 1."""
    bos = processor.tokenizer.bos_token or ""
    text = [bos + str(processor.image_token)]
    inputs = processor(images=[next(_images())], text=text, return_tensors="pt", add_special_tokens=False)
    inputs = inputs.to(model.device)
    ids = torch.tensor([processor.tokenizer.encode(_CAPTION + "\n", add_special_tokens=False)], device=model.device)
    row = torch.cat([inputs["input_ids"], ids], dim=1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), ids], dim=1)
    loss = model(input_ids=row, pixel_values=for_tower(model, inputs["pixel_values"]), labels=labels).loss.item()
    uniform = math.log(model.config.get_text_config().vocab_size)
    detail = f"{loss:.2f}; guessing gives ln({model.config.get_text_config().vocab_size}) = {uniform:.2f}"
    if not math.isfinite(loss):
        return Check("first loss", "fail", detail, "values overflow; load with bfloat16 or float32")
    if loss > FIRST_LOSS * uniform:
        advice = "a loss near ln(vocabulary) means that the language model's weights or dtype are broken"
        return Check("first loss", "warn", detail, advice)
    return Check("first loss", "ok", detail)


def _images() -> Iterator[Image.Image]:
    """Three images that any tower tells apart: a red disc, stripes, and a blue gradient."""
    disc = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(disc).ellipse((50, 50, 174, 174), fill="red")
    yield disc
    stripes = Image.new("RGB", (224, 224), "black")
    for left in range(0, 224, 32):
        ImageDraw.Draw(stripes).rectangle((left, 0, left + 15, 223), fill="yellow")
    yield stripes
    yield Image.merge(
        "RGB", [Image.linear_gradient("L").resize((224, 224)).point(lambda v, k=k: v * k // 4) for k in (0, 2, 4)]
    )


def check_images(model: Model, processor: Processor) -> Check:
    """Compares the projected features of three images, pair by pair."""
    features = features_of(model, processor, list(_images())).float()  # (3, K, D)
    if not bool(torch.isfinite(features).all()):
        advice = "values overflow; load with bfloat16 or float32"
        return Check("image features", "fail", "features with inf or nan", advice)
    pairs = [(a, b) for a in range(3) for b in range(a)]
    differences = [((features[a] - features[b]).norm() / features[a].norm()).item() for a, b in pairs]
    detail = f"three images differ by {min(differences):.2g} to {max(differences):.2g} of their norm"
    if not min(differences) > _SAME:
        advice = "the model does not see: vision tower, Q-Former or projector is broken; convert them again"
        return Check("image features", "fail", detail, advice)
    if min(differences) < _ALIKE:
        advice = "little for such different images; check vision tower and Q-Former"
        return Check("image features", "warn", detail, advice)
    return Check("image features", "ok", detail)


__all__ = ["SENTENCES", "check_first_loss", "check_images", "check_language"]
