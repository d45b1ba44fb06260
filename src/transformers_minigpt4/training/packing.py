"""Packs the rows of a batch into few sequences without padding, in which no row attends to another."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_minigpt4.data.schema import Row
from transformers_minigpt4.utils.families import family_of

from .collator import IGNORED, Batch, Collator


Count: TypeAlias = int | torch.Tensor
_PER_IMAGE = ("pixel_values", "image_features")  # tensors with one entry per image, in reading order


@dataclass
class PackingCollator:
    """
    Wraps a collator and removes the padding from its batches.

    Rows follow each other, each with positions from 0. Without an attention mask, transformers finds the rows by
    these positions and keeps them separate: with a block-diagonal mask for `sdpa`, `eager` and `flex_attention`, and
    with variable-length kernels for FlashAttention, which takes only one sequence per batch. Create it with [`pack`],
    which knows the model.

    Args:
        collator (`Callable`): Gives `input_ids`, `attention_mask`, `labels` of shape `(B, T)`, and images in reading
            order.
        image_token_id (`int`): The placeholder's id.
        max_tokens (`int`, *optional*):
            Positions of a sequence; by default the batch is one sequence, without padding. A dense mask
            grows with the square of a sequence, so shorter ones are faster without FlashAttention. Rows are then
            fitted best-first, long ones first, and a longer row gets a sequence to itself.

    Returns (per call): `input_ids`, `position_ids`, `labels` of shape `(sequences, positions)`, the images in their
    new order, no `attention_mask`, and `use_cache=False`. The first label of every row is -100, so that no row
    predicts the next one's start.
    """

    collator: Collator
    image_token_id: int
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} leaves no position. Take 1 or more, or None.")

    def __call__(self, examples: list[Row]) -> Batch:
        batch = dict(self.collator(examples))
        mask = batch.pop("attention_mask").bool()
        ids, labels = batch.pop("input_ids"), batch.pop("labels")
        lengths = mask.sum(dim=1).tolist()
        sequences = [list(range(len(lengths)))] if self.max_tokens is None else best_fit(lengths, self.max_tokens)
        shape = len(sequences), max(sum(lengths[row] for row in rows) for rows in sequences)
        # An unused place has position 0 and so is a separate row, which nothing attends to.
        packed: Batch = {
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
        """The images in the rows' new order; each has the same number of placeholders."""
        placeholders = ((ids == self.image_token_id) & mask).sum(dim=1)
        each, rest = divmod(int(placeholders.sum()), len(images))
        if rest or each == 0 or bool((placeholders % each).any()):
            raise ValueError(
                f"The batch has {len(images)} images and {placeholders.tolist()} placeholders in its rows, which is "
                "not the same number for each image. Packing needs images of one size."
            )
        by_row = images.split((placeholders // each).tolist())
        return torch.cat([by_row[row] for row in order])


def pack(model: PreTrainedModel, collator: Collator, max_tokens: int | None = None) -> PackingCollator:
    """
    A [`PackingCollator`] for a model.

    Raises:
        ValueError: for a model that would mix rows: an encoder-decoder, or several sequences with FlashAttention.
    """
    check_packable(model.config)
    attention = str(model.config.get_text_config()._attn_implementation)
    if max_tokens is not None and "flash" in attention:
        raise ValueError(
            f"max_tokens={max_tokens} with {attention}: FlashAttention separates the rows of one sequence, not those "
            "of several. Leave max_tokens unset; these kernels lose nothing on a long sequence."
        )
    return PackingCollator(collator, model.config.image_token_id, max_tokens)


def check_packable(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: for an encoder-decoder.
    """
    family = family_of(config)
    if family.encoder_decoder:
        raise ValueError(
            f"{family.name} is an encoder-decoder here, which cannot separate packed rows. Train it padded, without "
            "pack_rows."
        )


def count_tokens(batch: Batch) -> tuple[Count, Count, int]:
    """
    Rows of a batch, positions that they take, and all its positions; packed or not, as numbers or tensors of one.

    In a packed batch a row begins where position 0 is followed by position 1; other zeros are unused places.
    """
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask.shape[0], mask.sum(), mask.numel()
    positions = batch.get("position_ids")
    if positions is None:
        return 0, 0, 0
    continues = torch.zeros_like(positions, dtype=torch.bool)
    continues[:, :-1] = positions[:, 1:] == 1
    starts = positions == 0
    return (starts & continues).sum(), positions.numel() - (starts & ~continues).sum(), positions.numel()


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """
    Rows by sequence: longest first, each into the fullest sequence that still has room for it.

    Args:
        lengths (`list[int]`): Positions of each row.
        capacity (`int`): Positions of a sequence; a longer row gets one to itself.
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
