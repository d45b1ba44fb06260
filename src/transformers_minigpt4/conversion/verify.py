"""Checks whether a checkpoint is composed correctly: tokens, weights, language, sight; and says what is wrong."""

import gc
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageDraw

from transformers_minigpt4.modeling.configuration_minigpt4 import MiniGPT4Config
from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from transformers_minigpt4.modeling.trained_modules_minigpt4 import checkpoint_files
from transformers_minigpt4.processing.chat_templates_minigpt4 import VICUNA_V0
from transformers_minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from transformers_minigpt4.utils.models import usable_device
from transformers_minigpt4.utils.text import first_line

from .key_maps import PROJECTOR, shorten
from .tensor_files import read_file


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
# Ids of ### in LLaMA's vocabulary: after a space, and after a word (demo.py of Vision-CAIR/MiniGPT-4).
_LLAMA_ROWS, _LLAMA_STOPS = range(32000, 32004), {(835,), (2277, 29937)}
# Relative differences of projected features: equal up to rounding, and suspiciously alike.
_SAME, _ALIKE = 1e-4, 1e-2

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One check: its name, how it went, what was found, and what to do about it."""

    name: str
    status: Status
    detail: str
    advice: str = ""


@dataclass
class Report:
    """What `verify_checkpoint` found."""

    checkpoint: str
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no check failed; warnings do not count."""
        return all(check.status != "fail" for check in self.checks)

    def __str__(self) -> str:
        lines = [self.checkpoint]
        for check in self.checks:
            lines.append(f"{check.status:<5} {check.name:<17} {check.detail}")
            if check.advice and check.status != "ok":
                lines.append(f"{'':<23} -> {check.advice}")
        counts = Counter(check.status for check in self.checks)
        summary = ", ".join(f"{counts[status]} {status}" for status in ("ok", "warn", "fail") if counts[status])
        return "\n".join([*lines, f"{'passed' if self.ok else 'FAILED'}: {summary}"])


def verify_checkpoint(
    checkpoint: str | os.PathLike[str],
    *,
    sentences: Sequence[str] = SENTENCES,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
) -> Report:
    """
    Checks a checkpoint, complete or of trained modules.

    Args:
        checkpoint: Folder or Hub id.
        sentences: Ordinary sentences in the language of the language model, at least eight tokens each.
        dtype: To load the weights with; by default the one they are stored with.
        device: To run on, such as `"cpu"`; `"auto"` distributes the model over all GPUs. By default the first GPU, or
            the CPU without one.

    Returns:
        [`Report`]: One check each of dtype, vocabulary, special tokens, `###`, finite weights, language model, first
        loss and image features, and one of the chat template if it cannot be trained. If the checkpoint does not load,
        or its tokenizer belongs to another model, only those that are possible.
    """
    device = usable_device(device)
    report = Report(str(checkpoint))
    checks = report.checks
    try:
        config = MiniGPT4Config.from_pretrained(checkpoint)
        processor = MiniGPT4Processor.from_pretrained(checkpoint)
        checks.append(_check_dtypes(config, checkpoint_files(str(checkpoint))))
        model = MiniGPT4ForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, device_map=device)
    except Exception as error:  # whatever it is, it is the finding
        checks.append(
            Check(
                "loading",
                "fail",
                first_line(error),
                "convert the weights again, or take config and weights of one model"
                if os.path.exists(checkpoint)
                else "there is no such folder on this computer; check the path or Hub id",
            )
        )
        return report
    model = model.eval()
    vocabulary = _check_vocabulary(config, processor)
    checks.append(vocabulary)
    checks.append(_check_special_tokens(config, model, processor))
    checks.append(_check_stop_strings(config, model, processor))
    checks += _check_chat_template(processor)
    checks.append(_check_finite(model))
    with torch.inference_mode():
        if vocabulary.status == "ok":  # else the ids mean nothing to this model
            checks.append(_check_language(model, processor, sentences))
            checks.append(_check_first_loss(model, processor))
        try:
            checks.append(_check_images(model, processor))
        except ValueError as error:
            advice = "the processor does not fit the model: compare its size with vision_config.image_size"
            checks.append(Check("image features", "fail", str(error), advice))
    del model
    gc.collect()
    return report


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _check_dtypes(config: MiniGPT4Config, files: Sequence[Path]) -> Check:
    stored: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for path in files:
        for name, entry in read_file(path).items():
            kind = "projector" if name.startswith(PROJECTOR) else "language model" if "language_model" in name else ""
            stored.setdefault(kind, set()).add(_name(entry.dtype))
            counts[_name(entry.dtype)] += 1
    detail = ", ".join(f"{count} tensors in {dtype}" for dtype, count in counts.most_common())
    detail += f"; loaded as {_name(config.dtype)}" if config.dtype is not None else ""
    if stored.get("projector", {"float32"}) != {"float32"}:
        kinds = "/".join(sorted(stored["projector"]))
        advice = "keep the projector in float32: training steps are lost in fewer bits; convert again"
        return Check("dtype", "warn", f"{detail}; projector in {kinds}", advice)
    language = stored.get("language model", set())
    if config.dtype is not None and language and _name(config.dtype) not in language:
        advice = f"set dtype in config.json to {'/'.join(sorted(language))}, or pass it when loading"
        return Check("dtype", "warn", f"{detail}; language model in {'/'.join(sorted(language))}", advice)
    return Check("dtype", "ok", detail)


def _check_vocabulary(config: MiniGPT4Config, processor: MiniGPT4Processor) -> Check:
    tokens, rows = len(processor.tokenizer), config.text_config.vocab_size
    name, detail = "vocabulary", f"{tokens} tokens, {rows} rows, image token {config.image_token_id}"
    if tokens > rows:
        advice = "tokenizer and language model do not match; convert again with both from one folder"
        return Check(name, "fail", detail, advice)
    if processor.image_token_id != config.image_token_id:
        detail += f", but {processor.image_token} is {processor.image_token_id} in the tokenizer"
        return Check(name, "fail", detail, "take processor and model of one checkpoint, or convert again")
    if processor.image_seq_length != config.image_seq_length:
        detail += f"; the processor gives {processor.image_seq_length} per image, the model {config.image_seq_length}"
        return Check(name, "fail", detail, "take processor and model of one checkpoint, or convert again")
    return Check(name, "ok", detail)


def _check_special_tokens(
    config: MiniGPT4Config, model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor
) -> Check:
    tokenizer, generation = processor.tokenizer, model.generation_config
    wrong = []
    for token in ("bos", "eos", "pad"):
        expected = getattr(tokenizer, f"{token}_token_id")
        for where, settings in (("config.text_config", config.text_config), ("generation_config", generation)):
            found = getattr(settings, f"{token}_token_id", None)
            found_ids = found if isinstance(found, (list, tuple)) else [found]
            if expected is not None and expected not in found_ids:
                wrong.append(f"{where} has {token} {found}, the tokenizer {expected}")
    ids = ", ".join(f"{token} {getattr(tokenizer, f'{token}_token_id')}" for token in ("bos", "eos", "pad"))
    if wrong:
        advice = "the tokenizer is right: copy its ids, or convert again (configs of Vicuna v0 say 0, 1 and -1)"
        return Check("special tokens", "fail", "; ".join(wrong), advice)
    if tokenizer.eos_token_id is None or tokenizer.bos_token_id == tokenizer.eos_token_id:
        advice = "the tokenizer's files come from a broken conversion; take them from another copy of the model"
        return Check("special tokens", "fail", f"{ids}: begin and end of a text are the same token", advice)
    return Check("special tokens", "ok", ids)


def _check_stop_strings(
    config: MiniGPT4Config, model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor
) -> Check:
    """Tokenizes answers with their stop strings, and checks that generation would stop there."""
    name, stop_strings = "end of answers", processor.stop_strings
    if not stop_strings:
        ends = processor.tokenizer.convert_ids_to_tokens(_as_list(model.generation_config.eos_token_id))
        return Check(name, "ok", f"this template has no ###; answers end at {', '.join(ends)}")
    stops = {(token,) for token in _as_list(model.generation_config.eos_token_id)}
    stops |= {tuple(ids) for ids in getattr(model.generation_config, "stop_sequences", None) or []}
    found: set[tuple[int, ...]] = set()
    for stop_string in stop_strings:
        for text in ("A red circle.", "A red circle", "A red circle. "):
            ids = processor.tokenizer.encode(text + stop_string, add_special_tokens=False)
            before = processor.tokenizer.encode(text.rstrip(), add_special_tokens=False)
            found.add(tuple(ids[len(before) :]))
    detail = f"{' '.join(stop_strings)} is {' or '.join(str(list(ids)) for ids in sorted(found, key=len))}"
    missed = [ids for ids in found if not any(ids[-len(stop) :] == stop for stop in stops)]
    if missed:
        advice = "save processor.get_generation_config() with the model, or convert again"
        return Check(name, "fail", f"{detail}; generation would not stop at {shorten(list(map(str, missed)))}", advice)
    is_llama = config.text_config.model_type == "llama" and config.text_config.vocab_size in _LLAMA_ROWS
    if is_llama and processor.chat_template == VICUNA_V0 and found != _LLAMA_STOPS:
        advice = "this is not LLaMA's tokenizer, with which Vicuna was trained; use tokenizer.model of LLaMA"
        return Check(name, "fail", f"{detail}, but LLaMA has [835] or [2277, 29937]", advice)
    return Check(name, "ok", detail)


def _check_chat_template(processor: MiniGPT4Processor) -> list[Check]:
    """A check if the checkpoint cannot be trained on conversations (`prompt_format: messages`), else none."""
    try:
        processor.check_trainable()
    except ValueError as error:
        advice = "it answers, but cannot be trained on conversations; convert again with another --chat-template"
        return [Check("chat template", "warn", first_line(error), advice)]
    return []


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _check_finite(model: MiniGPT4ForConditionalGeneration) -> Check:
    broken, empty = [], []
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        # A sum would overflow, and a mask of all values would take as much memory again.
        rows = parameter.detach().reshape(-1).split(2**24)
        if not all(bool(torch.isfinite(part).all()) for part in rows):
            broken.append(name)
        elif parameter.ndim == 2 and not any(bool(part.any()) for part in rows):
            empty.append(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    if broken:
        advice = (
            "the file is damaged, or fp16 could not hold the values; convert again, with --dtype bfloat16 or float32"
        )
        return Check("finite weights", "fail", f"{len(broken)} tensors with inf or nan: {shorten(broken, 3)}", advice)
    if empty:
        advice = "matrices of zeros were never loaded or trained; convert again"
        return Check("finite weights", "fail", f"{len(empty)} matrices of zeros: {shorten(empty, 3)}", advice)
    return Check("finite weights", "ok", f"{count / 1e9:.2f} B parameters" if count > 1e8 else f"{count:,} parameters")


def _check_language(
    model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor, sentences: Sequence[str]
) -> Check:
    """Mean loss of plain sentences after `<s>`, of all but the first token."""
    losses: list[float] = []
    for sentence in sentences:
        ids = processor.tokenizer.encode(sentence, add_special_tokens=False)
        bos = processor.tokenizer.bos_token_id
        row = torch.tensor([[*([bos] if bos is not None else []), *ids]], device=model.device)
        logits = model(input_ids=row).logits[0, :-1].float()
        losses.extend(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none").tolist())
    loss, uniform = sum(losses) / len(losses), math.log(model.config.text_config.vocab_size)
    detail = f"perplexity {_perplexity(loss)} on {len(sentences)} sentences; guessing gives {_perplexity(uniform)}"
    if not loss < BROKEN * uniform:
        advice = (
            "the language model's weights are wrong: a delta without its base, another version, or a broken copy; "
            "get them again (if its language is not English, pass --sentences)"
        )
        return Check("language model", "fail", detail, advice)
    if loss > POOR * uniform:
        advice = "poor for ordinary English; check that these are the right weights and, for a delta, the right base"
        return Check("language model", "warn", detail, advice)
    return Check("language model", "ok", detail)


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.0f}" if loss < 50 else "beyond e^50"


def _check_first_loss(model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor) -> Check:
    """Loss of a caption after an image, as in the first step of stage 1."""
    bos = processor.tokenizer.bos_token or ""
    inputs = processor(images=[next(_images())], text=[bos + processor.image_token], return_tensors="pt").to(
        model.device
    )
    ids = torch.tensor([processor.tokenizer.encode(_CAPTION + "\n", add_special_tokens=False)], device=model.device)
    row = torch.cat([inputs["input_ids"], ids], dim=1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), ids], dim=1)
    loss = model(input_ids=row, pixel_values=_for_tower(model, inputs["pixel_values"]), labels=labels).loss.item()
    uniform = math.log(model.config.text_config.vocab_size)
    detail = f"{loss:.2f}; guessing gives ln({model.config.text_config.vocab_size}) = {uniform:.2f}"
    if not math.isfinite(loss):
        return Check("first loss", "fail", detail, "values overflow; load with bfloat16 or float32")
    if loss > FIRST_LOSS * uniform:
        advice = "a loss near ln(vocabulary) means that the language model's weights or dtype are broken"
        return Check("first loss", "warn", detail, advice)
    return Check("first loss", "ok", detail)


def _for_tower(model: MiniGPT4ForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    first = next(model.get_submodule("model.vision_tower").parameters())
    return pixels.to(first.device, first.dtype)


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


def _check_images(model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor) -> Check:
    """Compares the projected features of three images, pair by pair."""
    pixels = processor.image_processor(list(_images()), return_tensors="pt")["pixel_values"]
    features: torch.Tensor = model.get_image_features(_for_tower(model, pixels))["pooler_output"].float()  # (3, K, D)
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


__all__ = ["SENTENCES", "Check", "Report", "verify_checkpoint"]
