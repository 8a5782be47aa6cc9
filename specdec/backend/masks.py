"""Attention masks for a padded batch of trees behind prefixes of different lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tree_visibility(
    lengths: Sequence[int], ancestors: Tensor, positions: Tensor, visible: int, window: int | None
) -> Tensor:
    """Returns ``[B, 1, N, visible]`` bool, True where a query may look.

    A node sees its whole prefix (slots ``0 .. lengths[b]``) and, among the tree's nodes at the
    slots behind it, itself and its ancestors.

    Args:
        lengths: committed tokens of each row.
        ancestors: ``[B, N, M]`` bool, entry (i, j): new node i sees node j; the N new nodes are the
            last of the tree's M.
        positions: ``[B, M]`` int64 position of each of the tree's nodes; siblings share one.
        visible: slots attended over, at least ``max(lengths) + M``.
        window: only positions less than `window` behind the query are seen; None for all.
    """
    batch_size, new, count = ancestors.shape
    device = ancestors.device
    slots = torch.arange(visible, device=device)
    starts = torch.tensor(lengths, device=device).unsqueeze(1)
    mask = (slots < starts).unsqueeze(1).repeat(1, new, 1)
    slot_positions = slots.repeat(batch_size, 1)
    for row, start in enumerate(lengths):
        mask[row, :, start : start + count] = ancestors[row]
        slot_positions[row, start : start + count] = positions[row]
    if window is not None:
        distance = positions[:, count - new :].unsqueeze(2) - slot_positions.unsqueeze(1)
        mask &= distance < window
    return mask.unsqueeze(1)


def as_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the mask as eager attention adds it: 0 where it is True, the lowest number else."""
    # filled on the device: a copy from the host cannot be captured
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), lowest)
