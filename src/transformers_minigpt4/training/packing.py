"""Packs the rows of a batch into few sequences without padding, none of which sees another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .collator import IGNORED


_PER_IMAGE = ("pixel_values", "image_features")  # tensors with one entry per picture, in reading order


@dataclass
class PackingCollator:
    """
    Goes around a collator and takes the padding out of its batches.

    Rows stand one behind the other, each with positions from 0. Without an attention mask, transformers reads rows off
    these positions and keeps them apart: with a block-diagonal mask for `sdpa`, `eager` and `flex_attention`, and with
    variable-length kernels for FlashAttention, which takes one sequence per batch only. Make it with [`pack`], which
    knows the model.

    Args:
        collator (`Callable`): Gives `input_ids`, `attention_mask`, `labels` of shape `(B, T)`, and pictures in reading
            order.
        image_token_id (`int`): The placeholder's id.
        max_tokens (`int`, *optional*):
            Positions of a sequence; by default the whole batch is one sequence, with no padding at all. A dense mask
            grows with the square of a sequence, so shorter ones are faster without FlashAttention. Rows are then
            fitted best-first, long ones first, and a row that is longer stands alone.

    Returns (per call): `input_ids`, `position_ids`, `labels` of shape `(sequences, positions)`, the pictures in their
    new order, no `attention_mask`, and `use_cache=False`. The first label of every row is -100, so that no row
    predicts the next one's start.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    image_token_id: int
    max_tokens: int | None = None

    def __post_init__(self):
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} leaves no position. Take 1 or more, or None.")

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.collator(examples))
        mask = batch.pop("attention_mask").bool()
        ids, labels = batch.pop("input_ids"), batch.pop("labels")
        lengths = mask.sum(dim=1).tolist()
        sequences = [list(range(len(lengths)))] if self.max_tokens is None else best_fit(lengths, self.max_tokens)
        shape = len(sequences), max(sum(lengths[row] for row in rows) for rows in sequences)
        # A place that no row takes has position 0 and so is a row of its own, which nobody reads.
        packed: dict[str, Any] = {
            "use_cache": False,  # with a cache, transformers would read positions as one row's and mix them
            "input_ids": torch.zeros(shape, dtype=ids.dtype),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for sequence, rows in enumerate(sequences):
            end = 0
            for row in rows:
                place = sequence, slice(end, end + lengths[row])
                packed["input_ids"][place] = ids[row][mask[row]]
                packed["labels"][place] = labels[row][mask[row]]
                packed["labels"][sequence, end] = IGNORED
                packed["position_ids"][place] = torch.arange(lengths[row])
                end += lengths[row]
        order = [row for rows in sequences for row in rows]
        for name in _PER_IMAGE:
            if batch.get(name) is not None:
                batch[name] = self._reordered(batch[name], ids, mask, order)
        return {**batch, **packed}

    def _reordered(
        self, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, order: list[int]
    ) -> torch.Tensor:
        """The pictures in the rows' new order; each takes as many placeholders as any other."""
        placeholders = ((ids == self.image_token_id) & mask).sum(dim=1)
        each, rest = divmod(int(placeholders.sum()), len(images))
        if rest or each == 0 or bool((placeholders % each).any()):
            raise ValueError(
                f"The batch has {len(images)} pictures and {placeholders.tolist()} placeholders in its rows, which "
                "is not the same number for each picture. Packing needs pictures of one size."
            )
        by_row = images.split((placeholders // each).tolist())
        return torch.cat([by_row[row] for row in order])


def pack(
    model: PreTrainedModel, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], max_tokens: int | None = None
) -> PackingCollator:
    """
    A [`PackingCollator`] for a model.

    Raises:
        ValueError: for a model that would mix rows: an encoder-decoder, or several sequences with FlashAttention.
    """
    config: Any = model.config
    if getattr(config, "model_type", None) == "blip-2":
        raise ValueError("BLIP-2 is an encoder-decoder here, which cannot keep packed rows apart. Train it padded.")
    attention = str(config.get_text_config()._attn_implementation)
    if max_tokens is not None and "flash" in attention:
        raise ValueError(
            f"max_tokens={max_tokens} with {attention}: FlashAttention keeps the rows of one sequence apart, not "
            "those of several. Leave max_tokens unset; these kernels lose nothing on a long sequence."
        )
    return PackingCollator(collator, config.image_token_id, max_tokens)


def count_tokens(batch: dict[str, Any]) -> tuple[Any, Any, int]:
    """
    Rows of a batch, positions that they take, and all its positions; packed or not, as numbers or tensors of one.

    In a packed batch a row begins where position 0 is followed by position 1; other zeros are places without a row.
    """
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask.shape[0], mask.sum(), mask.numel()
    positions = batch.get("position_ids")
    if positions is None:
        return 0, 0, 0
    goes_on = torch.zeros_like(positions, dtype=torch.bool)
    goes_on[:, :-1] = positions[:, 1:] == 1
    starts = positions == 0
    return (starts & goes_on).sum(), positions.numel() - (starts & ~goes_on).sum(), positions.numel()


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """
    Rows by sequence: longest first, each into the fullest sequence that still has room for it.

    Args:
        lengths (`list[int]`): Positions of each row.
        capacity (`int`): Positions of a sequence; a longer row stands alone.
    """
    sequences: list[tuple[int, list[int]]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fitting = [place for place, (used, _) in enumerate(sequences) if used + lengths[row] <= capacity]
        if not fitting:
            sequences.append((lengths[row], [row]))
            continue
        place = max(fitting, key=lambda place: sequences[place][0])
        used, rows = sequences[place]
        sequences[place] = used + lengths[row], [*rows, row]
    return [rows for _, rows in sequences]
