"""Describes images in one or two turns; the second one reuses what the model computed for the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from PIL import Image
from transformers import GenerationConfig, ProcessorMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from transformers_minigpt4.inference.engines import Request, TokenEngine, TokenRequest, TransformersEngine
from transformers_minigpt4.inference.generation import decode_answers
from transformers_minigpt4.utils.models import GenerativeModel

from .config import CurationConfig
from .settings_file import CurationError


PLACEHOLDER = "<ImageHere>"
TurnEngine: TypeAlias = TransformersEngine | TokenEngine


@dataclass(frozen=True)
class Description:
    """What the model wrote about one image: the answers of its one or two turns, and their lengths in tokens."""

    turns: tuple[str, ...]
    tokens: tuple[int, ...]

    @property
    def text(self) -> str:
        """The turns, joined."""
        return " ".join(turn for turn in self.turns if turn)


def describe_in_turns(images: Sequence[Image.Image], engine: TurnEngine, config: CurationConfig) -> list[Description]:
    """
    Describes images, with a second turn for the answers of at most `config.continue_below` tokens.

    Args:
        images: RGB images, at most as many as the engine works on at once.
        engine: An image-text-to-text model.
        config: Prompts and limits. With `<ImageHere>` in the prompt the second turn continues from the ids of the
            first, whose keys and values are kept; otherwise the processor's chat template joins the turns.

    Raises:
        CurationError: for a prompt that is unsuitable for the processor.
    """
    processor = engine.processor
    if PLACEHOLDER not in config.prompt:
        return _chat_turns(images, engine, config)
    if getattr(processor, "image_token", None) != PLACEHOLDER:
        raise CurationError(
            f"{config.checkpoint} does not know {PLACEHOLDER}, which the prompt contains; write `prompt` and "
            "`continue_prompt` as plain questions, to use its own chat template"
        )
    if isinstance(engine, TransformersEngine):
        return _cached_turns(images, engine.model, processor, config)
    return _token_turns(images, engine, config)


def _token_turns(images: Sequence[Image.Image], engine: TokenEngine, config: CurationConfig) -> list[Description]:
    """Two turns by ids, for engines that find the first one in their cache."""
    tokenizer = engine.processor.tokenizer
    prompt: list[int] = tokenizer(config.prompt)["input_ids"]
    turn: list[int] = tokenizer(config.continue_prompt, add_special_tokens=False)["input_ids"]

    def answers(rows: Sequence[int], prompts: Sequence[list[int]]) -> list[tuple[str, list[int]]]:
        """The text of each answer, and its ids without the end mark."""
        requests = [TokenRequest([images[row]], ids) for row, ids in zip(rows, prompts, strict=True)]
        found = []
        for ids in engine.answer_ids(requests, **_settings(config), **_seed(engine, config)):
            new = torch.tensor([ids])
            length = int(answer_lengths(new, engine.generation_config))
            found.append((decode_answers(engine.processor, new)[0], ids[:length]))
        return found

    first = answers(range(len(images)), [prompt] * len(images))
    found = [Description((text,), (len(ids),)) for text, ids in first]
    short = [row for row, (_, ids) in enumerate(first) if config.continue_below and len(ids) <= config.continue_below]
    more = answers(short, [prompt + first[row][1] + turn for row in short])
    for row, (text, ids) in zip(short, more, strict=True):
        found[row] = Description((first[row][0], text), (len(first[row][1]), len(ids)))
    return found


def _cached_turns(
    images: Sequence[Image.Image], model: GenerativeModel, processor: ProcessorMixin, config: CurationConfig
) -> list[Description]:
    """Two turns in one batch; the second reuses keys and values of the first, image and answer included."""
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


def _seed(engine: TurnEngine, config: CurationConfig) -> dict[str, object]:
    """Of each sampled answer, for engines that do not draw with torch's seed."""
    return {"seed": config.seed} if config.do_sample and not isinstance(engine, TransformersEngine) else {}


def _chat_turns(images: Sequence[Image.Image], engine: TurnEngine, config: CurationConfig) -> list[Description]:
    """Two turns through the processor's chat template, for models of any family."""

    def length(text: str) -> int:
        return len(engine.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    settings = _settings(config) | _seed(engine, config)
    first = list(engine.answers([Request([image], config.prompt) for image in images], **settings))
    found = [Description((text,), (length(text),)) for text in first]
    short = [row for row, text in enumerate(first) if config.continue_below and length(text) <= config.continue_below]
    if short and not getattr(engine.processor, "chat_template", None):
        raise CurationError(
            f"{config.checkpoint} has no chat template, so it takes no second turn; set `continue_below: 0`"
        )
    asked = [Request([images[row]], config.continue_prompt, [(config.prompt, first[row])]) for row in short]
    for row, text in zip(short, engine.answers(asked, **settings), strict=True):
        found[row] = Description((first[row], text), (found[row].tokens[0], length(text)))
    return found
