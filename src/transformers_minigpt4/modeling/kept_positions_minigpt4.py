"""Which hidden states become logits, for every version of transformers that is supported."""

import torch


def kept_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    The hidden states whose logits are wanted; what newer transformers have as `slice_logits_to_keep`.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, D)`): Those of all positions.
        logits_to_keep (`int` or `torch.Tensor`):
            The number of last positions, 0 for all; indices of shape `(kept,)`, the same in every row, or
            `(B, kept)`; or a boolean mask of shape `(B, T)`.

    Returns:
        `torch.Tensor` of shape `(B, kept, D)`; `(kept, D)` for a mask, which may keep more of one row.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]  # -0 is 0
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
