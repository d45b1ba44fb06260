"""Combines tensors of several sources: fused biases, deltas, one more token; and checks names and shapes."""

from collections.abc import Callable, Mapping

import torch

from .key_maps import EMBEDDING, HEAD, POST_LAYERNORM, PROJECTOR, THIRDS, KeyMap, shorten
from .weights import Piece, Weights


_ROWS_AT_ONCE = 8192  # of an embedding, summed in fp64


def mapped(weights: Weights, key_map: KeyMap) -> dict[str, Piece]:
    """
    The tensors of a source by their names in a MiniGPT-4 checkpoint.

    Raises:
        ValueError: for tensors that the key map does not know.
    """
    pieces = {target: weights.piece(key) for key, target in key_map.apply(weights.keys, weights.label).items()}
    thirds: dict[str, dict[str, Piece]] = {}
    for name in [name for name in pieces if name.endswith(THIRDS)]:
        thirds.setdefault(name[:-2], {})[name[-2:]] = pieces.pop(name)
    return {**pieces, **{name: _fused(found) for name, found in thirds.items()}}


def _fused(found: Mapping[str, Piece]) -> Piece:
    """Query, key and value stacked; a missing third is zero."""
    sample = next(iter(found.values()))
    rows = sample.shape[0]

    def read() -> torch.Tensor:
        parts = [
            found[third].read() if third in found else torch.zeros(sample.shape, dtype=sample.dtype)
            for third in THIRDS
        ]
        return torch.cat(parts)

    return Piece(sample.dtype, (len(THIRDS) * rows, *sample.shape[1:]), read)


def constant(tensor: torch.Tensor) -> Piece:
    """A tensor that is in memory already."""
    tensor = tensor.detach().contiguous()
    return Piece(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def add_delta(base: Mapping[str, Piece], delta: Mapping[str, Piece], labels: tuple[str, str]) -> dict[str, Piece]:
    """
    Base plus delta, in the delta's dtype, as FastChat's `apply_delta` adds them.

    Vicuna v0 had one token more than LLaMA. FastChat gave the base rows of zeros for it, so the rows of embedding and
    head that the delta has beyond the base's are the result's unchanged.

    Args:
        base: Tensors of the base, LLaMA.
        delta: Tensors of the delta.
        labels: What the two are called in messages.

    Raises:
        ValueError: for models of different tensors.
    """
    if base.keys() != delta.keys():
        raise ValueError(
            f"{labels[1]} is not a delta for {labels[0]}: only one of them has "
            f"{shorten(sorted(base.keys() ^ delta.keys()), 6)}."
        )
    for name in base:
        old, new = base[name].shape, delta[name].shape
        grows = name in (EMBEDDING, HEAD) and new[0] >= old[0] and new[1:] == old[1:]
        if old != new and not grows:
            raise ValueError(
                f"{labels[1]} is not a delta for {labels[0]}: {name} has shape {list(new)} and {list(old)}. Use the "
                "base of the delta's own size and kind."
            )
    return {name: _sum(base[name], delta[name]) for name in base}


def _sum(base: Piece, delta: Piece) -> Piece:
    def read() -> torch.Tensor:
        total, start = delta.read(), base.read()
        total[: start.shape[0]] += start.to(total.dtype)
        return total

    return Piece(delta.dtype, delta.shape, read)


def add_image_token(pieces: dict[str, Piece]) -> None:
    """
    Adds one row to embedding and head, for the image token.

    The head's row is zeros: its logit is then 0, far below the words', for programs that put their own head on the
    model; ours masks it (docs/architecture.md). The embedding's row is the mean of the others. Images replace it
    before anything reads it, but `inputs_embeds` without ids are searched for it, and zeros there are padding. Tied
    embeddings have one matrix for both and get the mean.
    """
    pieces[EMBEDDING] = _one_row_more(pieces[EMBEDDING], _mean_row)
    if HEAD in pieces:
        pieces[HEAD] = _one_row_more(pieces[HEAD], lambda tensor: torch.zeros_like(tensor[:1]))


def _one_row_more(piece: Piece, row: Callable[[torch.Tensor], torch.Tensor]) -> Piece:
    def read() -> torch.Tensor:
        tensor = piece.read()
        return torch.cat([tensor, row(tensor)])

    return Piece(piece.dtype, (piece.shape[0] + 1, *piece.shape[1:]), read)


def _mean_row(tensor: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(1, tensor.shape[1], dtype=torch.float64)
    for rows in tensor.split(_ROWS_AT_ONCE):
        total += rows.double().sum(0, keepdim=True)
    return (total / tensor.shape[0]).to(tensor.dtype)


def check_projector(pieces: Mapping[str, Piece], label: str, in_features: int, language: str, width: int) -> None:
    """
    Compares the projector of a released checkpoint with the modules on either side of it.

    Args:
        pieces: Tensors of the checkpoint.
        label: What the checkpoint is called in messages.
        in_features: Width of the Q-Former, or of four patches.
        language: What the language model is called in messages.
        width: Its hidden size.

    Raises:
        ValueError: for a projector that is missing or has other widths.
    """
    missing = [part for part in ("weight", "bias") if f"{PROJECTOR}linear_1.{part}" not in pieces]
    if missing:
        raise ValueError(f"{label} has no llama_proj.{' and no llama_proj.'.join(missing)}: it contains no projector.")
    halves = [part for part in ("weight", "bias") if POST_LAYERNORM + part in pieces]
    if len(halves) == 1:
        raise ValueError(
            f"{label} has ln_vision.{halves[0]} alone. Weight and bias of the LayerNorm after the tower are replaced "
            "together: save both or neither."
        )
    out_width, in_width = pieces[f"{PROJECTOR}linear_1.weight"].shape
    if out_width != width:
        raise ValueError(
            f"The projector in {label} was trained for a language model that is {out_width} wide, but {language} is "
            f"{width} wide. Vicuna 7B and LLaMA-2 7B are 4096 wide, Vicuna 13B is 5120: use the one it was trained "
            "with."
        )
    if in_width != in_features:
        raise ValueError(
            f"The projector in {label} takes features that are {in_width} wide, but gets {in_features}. With "
            "Q-Former they are 768 wide, without (--qformer none) 5632, four patches of ViT-g: choose what it was "
            "trained with."
        )


def check_complete(pieces: Mapping[str, Piece], expected: Mapping[str, torch.Size]) -> None:
    """
    Compares the tensors found with those of the model.

    Raises:
        ValueError: for missing tensors, superfluous ones, and wrong shapes.
    """
    missing = sorted(expected.keys() - pieces.keys())
    if missing:
        raise ValueError(f"{len(missing)} tensors of the model are in no source: {shorten(missing)}.")
    foreign = sorted(pieces.keys() - expected.keys())
    if foreign:
        raise ValueError(
            f"{len(foreign)} tensors do not belong to the model that the configs describe: {shorten(foreign)}. Config "
            "and weights of a source do not match."
        )
    wrong = [
        f"{name} is {list(piece.shape)}, not {list(expected[name])}"
        for name, piece in sorted(pieces.items())
        if tuple(piece.shape) != tuple(expected[name])
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not have the shapes that the configs say: {shorten(wrong, 4)}.")
