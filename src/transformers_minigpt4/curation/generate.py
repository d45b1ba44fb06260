"""Describes sampled images with a checkpoint: in batches, with a second turn that reuses the first one's cache."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from transformers import GenerationConfig, ProcessorMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from transformers_minigpt4.inference.generation import (
    answer_prompts,
    decode_answers,
    encode_conversations,
    generate_ids,
)
from transformers_minigpt4.inference.loading import load_model_and_processor
from transformers_minigpt4.processing.image_utils_minigpt4 import ImageLoadError, load_image
from transformers_minigpt4.utils.files import JsonObject
from transformers_minigpt4.utils.models import GenerativeModel

from .config import CurationConfig, settings_hash
from .progress import bar
from .records import FAILED, Result, Work
from .sampling import Sampled, sample_images
from .settings_file import CurationError
from .store import Project


PLACEHOLDER = "<ImageHere>"


@dataclass(frozen=True)
class Description:
    """What the model wrote about one image: the answers of its one or two turns, and their lengths in tokens."""

    turns: tuple[str, ...]
    tokens: tuple[int, ...]

    @property
    def text(self) -> str:
        """The turns, joined."""
        return " ".join(turn for turn in self.turns if turn)


@dataclass(frozen=True)
class Generated:
    """What `run_generate` did."""

    sampled: Sampled
    described: int
    continued: int
    failed: int

    def __str__(self) -> str:
        text = f"{self.sampled}\n{self.described:,} described, {self.continued:,} of them in two turns"
        return text + (f"; {self.failed:,} failed, see `minigpt4 curate status`" if self.failed else "")


def run_generate(project: Project, config: CurationConfig, progress: bool = True) -> Generated:
    """
    Samples images and describes those that have no description yet, or one by other settings.

    Each batch is recorded when it is done; an interrupted run resumes with the batch that it was working on. An image
    whose file is missing or unreadable is recorded as failed, and tried again by the next run.

    Raises:
        CurationError: for a project that another process works on, or an unsuitable source or checkpoint.
        DataError: for a source that cannot be opened.
        ValueError: for a checkpoint that cannot be loaded.
    """
    with project.writer("generate"):
        sampled = sample_images(project, config, progress)
        settings = generate_settings(config)
        waiting = sum(1 for _ in project.pending("generate", settings))
        if not waiting:
            return Generated(sampled, 0, 0, 0)
        model, processor = load_model_and_processor(
            config.checkpoint, config.dtype, config.device, config.trust_remote_code
        )
        described = continued = failed = 0
        with bar("generate", waiting, shown=progress) as count:
            for works in _batches(project.pending("generate", settings), config.batch_size):
                results = _describe_works(project, works, model, processor, config, settings)
                project.record("generate", results)
                described += sum(result.outcome == "ok" for result in results)
                continued += sum(len(result.details.get("turns", ())) > 1 for result in results)
                failed += sum(result.outcome == FAILED for result in results)
                count(len(results))
        return Generated(sampled, described, continued, failed)


def generate_settings(config: CurationConfig) -> str:
    """The digest of what a description depends on, including the weights of a checkpoint in a folder."""
    return settings_hash(
        config.checkpoint,
        _weights_digest(Path(config.checkpoint)),
        config.dtype,
        config.prompt,
        config.continue_prompt,
        config.continue_below,
        config.max_new_tokens,
        config.seed if config.do_sample else None,
    )


def _weights_digest(folder: Path) -> list[str]:
    """Of a folder, since a retrained checkpoint in the same place is another one. It takes less time than loading."""
    digests = []
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests


def _batches(works: Iterator[Work], size: int) -> Iterator[list[Work]]:
    while batch := list(islice(works, size)):
        yield batch


def _describe_works(
    project: Project,
    works: list[Work],
    model: GenerativeModel,
    processor: ProcessorMixin,
    config: CurationConfig,
    settings: str,
) -> list[Result]:
    results, images, readable = [], [], []
    for work in works:
        path = project.image_path(work.pair)
        try:
            images.append(load_image(path))
            readable.append(work)
        except ImageLoadError as error:
            reason = "unreadable image" if path.exists() else "missing image"
            results.append(Result(work.pair.id, settings, work.input, FAILED, reason, details={"error": str(error)}))
    if not images:
        return results
    if config.do_sample:
        # Sampled answers depend only on the seed and the batch, not on how often the run was stopped.
        torch.manual_seed(config.seed * 1_000_003 + readable[0].pair.id)
    for work, found in zip(readable, describe_in_turns(images, model, processor, config)):
        details = {"turns": list(found.turns), "tokens": list(found.tokens)}
        outcome, reason = ("ok", "") if found.text else (FAILED, "empty answer")
        results.append(Result(work.pair.id, settings, work.input, outcome, reason, found.text, details))
    return results


def describe_in_turns(
    images: list[Image.Image], model: GenerativeModel, processor: ProcessorMixin, config: CurationConfig
) -> list[Description]:
    """
    Describes images in one batch, with a second turn for the answers of at most `config.continue_below` tokens.

    Args:
        images: RGB images.
        model: An image-text-to-text model.
        processor: Its processor.
        config: Prompts and limits. With `<ImageHere>` in the prompt the second turn reuses keys and values of the
            first, image and answer included; otherwise the processor's chat template joins the turns, and the second
            turn is computed from the start.

    Raises:
        CurationError: for a prompt that is unsuitable for the processor.
    """
    if PLACEHOLDER not in config.prompt:
        return _chat_turns(images, model, processor, config)
    if getattr(processor, "image_token", None) != PLACEHOLDER:
        raise CurationError(
            f"{config.checkpoint} does not know {PLACEHOLDER}, which the prompt contains; write `prompt` and "
            "`continue_prompt` as plain questions, to use its own chat template"
        )
    inputs = processor(images=[[image] for image in images], text=[config.prompt] * len(images), return_tensors="pt")
    inputs = inputs.to(model.device, dtype=model.dtype)
    width = inputs["input_ids"].shape[1]
    settings = _settings(config) | {"use_cache": True}
    # With `return_dict_in_generate` and one beam it gives this.
    output = cast(GenerateDecoderOnlyOutput, model.generate(**inputs, **settings, return_dict_in_generate=True))
    answers = output.sequences[:, width:]
    lengths = answer_lengths(answers, model.generation_config)
    first = decode_answers(processor, answers)
    found = [Description((text,), (length,)) for text, length in zip(first, lengths.tolist())]
    short = torch.nonzero(lengths <= config.continue_below).flatten() if config.continue_below else lengths[:0]
    if not len(short):
        return found
    turn = processor.tokenizer(config.continue_prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    answers = continue_answers(model, output, width, lengths, short, turn.to(lengths.device), **settings)
    more = zip(
        short.tolist(), decode_answers(processor, answers), answer_lengths(answers, model.generation_config).tolist()
    )
    for row, text, length in more:
        found[row] = Description((first[row], text), (found[row].tokens[0], length))
    return found


def continue_answers(
    model: GenerativeModel,
    output: GenerateDecoderOnlyOutput,
    width: int,
    lengths: torch.Tensor,
    rows: torch.Tensor,
    turn: torch.Tensor,
    **settings: object,
) -> torch.Tensor:
    """
    The second turn of some rows of a batch, computed from the keys and values of the first turn.

    Args:
        model: The model that gave the first turn.
        output: Of `generate` with `return_dict_in_generate`; its cache is changed.
        width, lengths, rows, turn: As for [`continue_inputs`].
        settings: For `generate`.

    Returns:
        `(R, new tokens)`: ids of the second answers.

    Raises:
        CurationError: for a model without a cache.
    """
    ids, mask = continue_inputs(output.sequences, width, lengths, rows, turn)
    cache = output.past_key_values
    if cache is None:
        raise CurationError("this model has no cache of keys and values, so it takes no second turn")
    # After the longest of the answers that continue, there is nothing to keep.
    cache.crop(min(0, ids.shape[1] - turn.shape[1] - cache.get_seq_length()))
    cache.batch_select_indices(rows)
    sequences = cast(
        torch.Tensor, model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **settings)
    )
    return sequences[:, ids.shape[1] :]


def continue_inputs(
    sequences: torch.Tensor, width: int, lengths: torch.Tensor, rows: torch.Tensor, turn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The second turn's ids and attention mask: prompt and answer as in the cache, then the new turn.

    An answer that ended early is followed by its end token and padding; the mask hides them, so that the positions of
    the new turn follow its last token.

    Args:
        sequences: `(B, width + new tokens)`, from the first turn.
        width: Positions of the prompt, the same for all.
        lengths: `(B,)`, tokens of each answer without its end token.
        rows: `(R,)`, the rows that continue.
        turn: `(1, N)`, ids of the second prompt.

    Returns:
        Two tensors `(R, width + longest answer + N)`.
    """
    lengths = lengths[rows]
    context = sequences[rows, : width + int(lengths.max())]
    places = torch.arange(context.shape[1], device=context.device)
    mask = (places[None] < width + lengths[:, None]).long()
    # The repetition penalty sees all ids, masked or not; hidden ones repeat one that counts anyway.
    context = torch.where(mask.bool(), context, turn[0, 0])
    turns = turn.expand(len(rows), -1)
    return torch.cat([context, turns], dim=1), torch.cat([mask, torch.ones_like(turns)], dim=1)


def answer_lengths(answers: torch.Tensor, generation_config: GenerationConfig) -> torch.Tensor:
    """
    Tokens of each answer before its end token or stop string.

    Args:
        answers: `(B, new tokens)`, the new ids only, padded after their end.
        generation_config: Names the end tokens, `eos_token_id`, and `stop_sequences`.

    Returns:
        `(B,)`; all new tokens for an answer without an end.
    """
    count, length = answers.shape
    eos = generation_config.eos_token_id
    ends_with: list[list[int]] = [[token] for token in ([eos] if isinstance(eos, int) else eos or [])]
    ends_with += getattr(generation_config, "stop_sequences", None) or []
    ends = torch.full((count,), length, device=answers.device)
    for ending in ends_with:
        if len(ending) > length:
            continue
        found = (answers.unfold(1, len(ending), 1) == torch.tensor(ending, device=answers.device)).all(-1)
        first = torch.where(found.any(1), found.int().argmax(1), length)
        ends = torch.minimum(ends, first)
    return ends


def _settings(config: CurationConfig) -> dict[str, object]:
    """For `generate`; with beams, the cache would hold several rows for each image."""
    return {
        "max_new_tokens": config.max_new_tokens,
        "do_sample": config.do_sample,
        "num_beams": 1,
        "num_return_sequences": 1,
    }


def _chat_turns(
    images: list[Image.Image], model: GenerativeModel, processor: ProcessorMixin, config: CurationConfig
) -> list[Description]:
    """Two turns through the processor's chat template, for models of any family."""
    settings = _settings(config)
    first = answer_prompts([[image] for image in images], [config.prompt] * len(images), model, processor, **settings)
    tokens = [len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in first]
    found = [Description((text,), (length,)) for text, length in zip(first, tokens)]
    short = [row for row, length in enumerate(tokens) if length <= config.continue_below]
    if not short or not config.continue_below:
        return found
    if not getattr(processor, "chat_template", None):
        raise CurationError(
            f"{config.checkpoint} has no chat template, so it takes no second turn; set `continue_below: 0`"
        )
    inputs = encode_conversations([_conversation(images[row], first[row], config) for row in short], processor)
    answers = generate_ids(model, inputs.to(model.device, dtype=model.dtype), **settings)
    for row, text in zip(short, decode_answers(processor, answers)):
        length = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        found[row] = Description((first[row], text), (tokens[row], length))
    return found


def _conversation(image: Image.Image, answer: str, config: CurationConfig) -> list[JsonObject]:
    question = [{"type": "image", "image": image}, {"type": "text", "text": config.prompt}]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": answer or " "}]},
        {"role": "user", "content": [{"type": "text", "text": config.continue_prompt}]},
    ]
