"""Checks whether a checkpoint is composed correctly: tokens, weights, language, sight; and says what is wrong."""

import gc
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, LlavaConfig, PreTrainedConfig

from transformers_minigpt4.modeling.configuration_minigpt4 import MiniGPT4Config
from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from transformers_minigpt4.modeling.trained_modules_minigpt4 import LazyTensors, assemble, checkpoint_files
from transformers_minigpt4.processing.chat_templates_minigpt4 import VICUNA_V0
from transformers_minigpt4.processing.processing_llava import image_positions
from transformers_minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from transformers_minigpt4.utils.models import usable_device
from transformers_minigpt4.utils.text import first_line

from .checks import Check, Model, Processor, Report
from .key_maps import PROJECTOR, shorten
from .tensor_files import read_file
from .verify_captions import Captioned, check_captions, own_images
from .verify_llava import check_features, check_prompt, load_llava, tower_positions
from .verify_model import SENTENCES, check_first_loss, check_images, check_language
from .verify_weights import (
    Tensors,
    check_finite,
    check_pixels,
    check_record,
    check_trained,
    records_of,
    untrained_parts,
)
from .weight_record import WeightRecord


# Ids of ### in LLaMA's vocabulary: after a space, and after a word (demo.py of Vision-CAIR/MiniGPT-4).
_LLAMA_ROWS, _LLAMA_STOPS = range(32000, 32004), {(835,), (2277, 29937)}


def verify_checkpoint(
    checkpoint: str | os.PathLike[str],
    *,
    sentences: Sequence[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
) -> Report:
    """
    Checks a checkpoint of MiniGPT-4 or LLaVA: complete, of trained modules, or of a PEFT adapter.

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
        chat template if it cannot be trained; of LLaVA, always one of the chat template and one of the layer that the
        projector sees. If the checkpoint does not load, or its tokenizer belongs to another
        model, only those that are possible.

    Raises:
        ValueError: for `images` that cannot be used.
    """
    device, checkpoint = usable_device(device), str(checkpoint)
    own = own_images(str(images)) if images is not None else None
    report = Report(checkpoint)
    checks = report.checks
    try:
        opened = _open(checkpoint, dtype, device, checks)
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
    config, processor, model, tensors, trained, records = opened
    untrained = untrained_parts(records, tensors, getattr(config, "trained_parameters", None) or ())
    vocabulary = _check_vocabulary(config, processor)
    checks.append(vocabulary)
    checks.append(_check_special_tokens(config, model, processor))
    if isinstance(processor, MiniGPT4Processor):
        checks.append(_check_stop_strings(config, model, processor))
        checks += _check_chat_template(processor)
    else:
        checks.append(check_prompt(processor))
        checks.append(check_features(model.config, records, untrained))
    checks.append(check_pixels(config, processor, records))
    checks.append(check_finite(model))
    checks.append(check_record(records, tensors, trained))
    checks.append(check_trained(tensors, config, records, untrained))
    with torch.inference_mode():
        try:
            if vocabulary.status == "ok":  # else the ids mean nothing to this model
                checks += _check_answers(model, processor, sentences, own, untrained)
            else:
                checks.append(check_images(model, processor))
        except (IndexError, ValueError) as error:
            advice = "the processor does not fit the model: compare its size with vision_config.image_size"
            checks.append(Check("image features", "fail", str(error), advice))
    del model, opened
    gc.collect()
    return report


class _Opened(NamedTuple):
    config: PreTrainedConfig
    processor: Processor
    model: Model
    tensors: Tensors
    trained: set[str]  # names of tensors that were trained since the records were written
    records: list[WeightRecord]


def _open(checkpoint: str, dtype: str | torch.dtype, device: str | None, checks: list[Check]) -> _Opened:
    """
    Loads a checkpoint; adds the check of its types.

    Raises:
        OSError, ValueError: and whatever else loading a damaged checkpoint may raise.
    """
    base = _base(checkpoint)
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if isinstance(config, LlavaConfig):
        checks.append(_check_dtypes(config, checkpoint_files(base), in_float32=False))
        llava, llava_processor = load_llava(checkpoint, base, dtype, device)
        records = records_of(base, config, ())
        return _Opened(config, llava_processor, llava.eval(), llava.state_dict(), set(), records)
    if not isinstance(config, MiniGPT4Config):
        raise ValueError(f"{base} is a {config.model_type!r}; MiniGPT-4 and LLaVA can be verified")
    processor = MiniGPT4Processor.from_pretrained(base)
    files = checkpoint_files(base)
    checks.append(_check_dtypes(config, files, in_float32=True))
    model = MiniGPT4ForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, device_map=device)
    tensors = assemble(config.base_checkpoints, files) if config.base_checkpoints else LazyTensors(files)
    trained = set(LazyTensors(files)) if config.base_checkpoints else set()
    return _Opened(config, processor, model.eval(), tensors, trained, records_of(base, config, trained))


def _base(checkpoint: str) -> str:
    """The checkpoint that a PEFT adapter changes, or the checkpoint itself."""
    adapter = Path(checkpoint) / "adapter_config.json"
    if not adapter.is_file():
        return checkpoint
    return str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])


def _check_answers(
    model: Model,
    processor: Processor,
    sentences: Sequence[str] | None,
    images: list[Captioned] | None,
    untrained: set[str],
) -> Iterator[Check]:
    """What the model makes of texts and images."""
    language, knows_only_shapes = check_language(model, processor, sentences)
    yield language
    yield check_first_loss(model, processor)
    yield check_images(model, processor)
    if "projector" in untrained:
        yield Check("captions", "skip", "the projector is untrained", "train it: `minigpt4 train`, stage 1")
    else:
        yield check_captions(model, processor, knows_only_shapes, images)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _check_dtypes(config: PreTrainedConfig, files: Sequence[Path], in_float32: bool) -> Check:
    """What the tensors are stored as; `in_float32` is for a projector that must be, as MiniGPT-4's."""
    stored: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for path in files:
        for name, entry in read_file(path).items():
            kind = "projector" if name.startswith(PROJECTOR) else "language model" if "language_model" in name else ""
            stored.setdefault(kind, set()).add(_name(entry.dtype))
            counts[_name(entry.dtype)] += 1
    detail = ", ".join(f"{count} tensors in {dtype}" for dtype, count in counts.most_common())
    detail += f"; loaded as {_name(config.dtype)}" if config.dtype is not None else ""
    if in_float32 and stored.get("projector", {"float32"}) != {"float32"}:
        kinds = "/".join(sorted(stored["projector"]))
        advice = "keep the projector in float32: training steps are lost in fewer bits; convert again"
        return Check("dtype", "warn", f"{detail}; projector in {kinds}", advice)
    language = stored.get("language model", set())
    if config.dtype is not None and language and _name(config.dtype) not in language:
        advice = f"set dtype in config.json to {'/'.join(sorted(language))}, or pass it when loading"
        return Check("dtype", "warn", f"{detail}; language model in {'/'.join(sorted(language))}", advice)
    return Check("dtype", "ok", detail)


def _check_vocabulary(config: PreTrainedConfig, processor: Processor) -> Check:
    tokens, rows = len(processor.tokenizer), config.text_config.vocab_size
    name, detail = "vocabulary", f"{tokens} tokens, {rows} rows, image token {config.image_token_id}"
    if tokens > rows:
        advice = "tokenizer and language model do not match; convert again with both from one folder"
        return Check(name, "fail", detail, advice)
    if processor.image_token_id != config.image_token_id:
        detail += f", but {processor.image_token} is {processor.image_token_id} in the tokenizer"
        return Check(name, "fail", detail, "take processor and model of one checkpoint, or convert again")
    if isinstance(processor, MiniGPT4Processor):
        given, expected = processor.image_seq_length, config.image_seq_length
    else:
        given, expected = image_positions(processor), tower_positions(config)
    if given != expected:
        detail += f"; the processor gives {given} per image, the model {expected}"
        return Check(name, "fail", detail, "take processor and model of one checkpoint, or convert again")
    return Check(name, "ok", detail)


def _check_special_tokens(config: PreTrainedConfig, model: Model, processor: Processor) -> Check:
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


def _check_stop_strings(config: PreTrainedConfig, model: Model, processor: MiniGPT4Processor) -> Check:
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


__all__ = ["SENTENCES", "Check", "Report", "verify_checkpoint"]
