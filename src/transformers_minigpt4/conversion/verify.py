"""Checks whether a checkpoint is composed correctly: tokens, weights, language, sight; and says what is wrong."""

import gc
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from transformers_minigpt4.modeling.configuration_minigpt4 import MiniGPT4Config
from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from transformers_minigpt4.modeling.trained_modules_minigpt4 import LazyTensors, assemble, checkpoint_files
from transformers_minigpt4.processing.chat_templates_minigpt4 import VICUNA_V0
from transformers_minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from transformers_minigpt4.utils.models import usable_device
from transformers_minigpt4.utils.text import first_line

from .checks import Check, Report
from .key_maps import PROJECTOR, shorten
from .tensor_files import read_file
from .verify_captions import SHAPES, Captioned, bundled, check_captions, for_tower, own_images
from .verify_weights import check_finite, check_pixels, check_record, check_trained, records_of, untrained_parts


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


def verify_checkpoint(
    checkpoint: str | os.PathLike[str],
    *,
    sentences: Sequence[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
) -> Report:
    """
    Checks a checkpoint: complete, of trained modules, or of a PEFT adapter.

    Args:
        checkpoint: Folder or Hub id.
        sentences: Ordinary sentences in the language of the language model, at least eight tokens each; English by
            default.
        images: Captioned images, six or more, of the kind that the model was trained on: a source of rows such as a
            folder with `metadata.jsonl`, or a JSON Lines or CSV file. By default a few that this package has.
        dtype: To load the weights with; by default the one they are stored with.
        device: To run on, such as `"cpu"`; `"auto"` distributes the model over all GPUs. By default the first GPU, or
            the CPU without one.

    Returns:
        [`Report`]: One check each of dtype, vocabulary, special tokens, `###`, image processor, finite weights,
        recorded weights, trained weights, language model, first loss, image features and captions, and one of the
        chat template if it cannot be trained. If the checkpoint does not load, or its tokenizer belongs to another
        model, only those that are possible.

    Raises:
        ValueError: for `images` that cannot be used.
    """
    device, checkpoint = usable_device(device), str(checkpoint)
    own = own_images(str(images)) if images is not None else None
    report = Report(checkpoint)
    checks = report.checks
    try:
        base = _base(checkpoint)
        config = MiniGPT4Config.from_pretrained(base)
        processor = MiniGPT4Processor.from_pretrained(base)
        files = checkpoint_files(base)
        checks.append(_check_dtypes(config, files))
        model = MiniGPT4ForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, device_map=device)
        tensors = assemble(config.base_checkpoints, files) if config.base_checkpoints else LazyTensors(files)
        trained = set(LazyTensors(files)) if config.base_checkpoints else set()
        records = records_of(base, config, trained)
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
    untrained = untrained_parts(records, tensors, config.trained_parameters or ())
    vocabulary = _check_vocabulary(config, processor)
    checks.append(vocabulary)
    checks.append(_check_special_tokens(config, model, processor))
    checks.append(_check_stop_strings(config, model, processor))
    checks += _check_chat_template(processor)
    checks.append(check_pixels(config, processor, records))
    checks.append(check_finite(model))
    checks.append(check_record(records, tensors, trained))
    checks.append(check_trained(tensors, config, records, untrained))
    with torch.inference_mode():
        try:
            if vocabulary.status == "ok":  # else the ids mean nothing to this model
                checks += _check_answers(model, processor, sentences, own, untrained)
            else:
                checks.append(_check_images(model, processor))
        except ValueError as error:
            advice = "the processor does not fit the model: compare its size with vision_config.image_size"
            checks.append(Check("image features", "fail", str(error), advice))
    del model
    gc.collect()
    return report


def _base(checkpoint: str) -> str:
    """The checkpoint that a PEFT adapter changes, or the checkpoint itself."""
    adapter = Path(checkpoint) / "adapter_config.json"
    if not adapter.is_file():
        return checkpoint
    return str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])


def _check_answers(
    model: MiniGPT4ForConditionalGeneration,
    processor: MiniGPT4Processor,
    sentences: Sequence[str] | None,
    images: list[Captioned] | None,
    untrained: set[str],
) -> Iterator[Check]:
    """What the model makes of texts and images."""
    language, knows_only_shapes = _check_language(model, processor, sentences)
    yield language
    yield _check_first_loss(model, processor)
    yield _check_images(model, processor)
    if "projector" in untrained:
        yield Check("captions", "skip", "the projector is untrained", "train it: `minigpt4 train`, stage 1")
    else:
        yield check_captions(model, processor, knows_only_shapes, images)


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


def _check_language(
    model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor, sentences: Sequence[str] | None
) -> tuple[Check, bool]:
    """Mean loss of plain sentences after `<s>`, and whether the model knows only texts about the demo's shapes."""
    uniform = math.log(model.config.text_config.vocab_size)
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


def _loss(model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor, sentences: Sequence[str]) -> float:
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


def _check_first_loss(model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor) -> Check:
    """Loss of a caption after an image, as in the first step of stage 1."""
    bos = processor.tokenizer.bos_token or ""
    inputs = processor(images=[next(_images())], text=[bos + processor.image_token], return_tensors="pt").to(
        model.device
    )
    ids = torch.tensor([processor.tokenizer.encode(_CAPTION + "\n", add_special_tokens=False)], device=model.device)
    row = torch.cat([inputs["input_ids"], ids], dim=1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), ids], dim=1)
    loss = model(input_ids=row, pixel_values=for_tower(model, inputs["pixel_values"]), labels=labels).loss.item()
    uniform = math.log(model.config.text_config.vocab_size)
    detail = f"{loss:.2f}; guessing gives ln({model.config.text_config.vocab_size}) = {uniform:.2f}"
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


def _check_images(model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor) -> Check:
    """Compares the projected features of three images, pair by pair."""
    pixels = processor.image_processor(list(_images()), return_tensors="pt")["pixel_values"]
    features: torch.Tensor = model.get_image_features(for_tower(model, pixels))["pooler_output"].float()  # (3, K, D)
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
