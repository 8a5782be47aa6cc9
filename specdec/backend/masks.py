"""Attention masks for a padded batch of trees behind prefixes of different lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_SEEN, _UNSEEN = np.float32(0), np.finfo(np.float32).min


def tree_visibility(
    lengths: Sequence[int], ancestors: Tensor, positions: Tensor, visible: int, window: int | None
) -> Tensor:
    """Returns ``[B, 1, N, visible]`` bool, True where a query may look.

    A node sees its whole prefix (slots ``0 .. lengths[b]``) and, among the tree's nodes at the
    slots behind it, itself and its ancestors.

    On the host, in numpy, whose calls take a third of the time of torch's here.

    Args:
        lengths: committed tokens of each row.
        ancestors: ``[B, N, M]`` bool, entry (i, j): new node i sees node j; the N new nodes are the
            last of the tree's M.
        positions: ``[B, M]`` int64 position of each of the tree's nodes; siblings share one.
        visible: slots attended over, at least ``max(lengths) + M``.
        window: only positions less than `window` behind the query are seen; None for all.
    """
    batch_size, new, count = ancestors.shape
    slots = np.arange(visible)
    starts = np.array(lengths)[:, None]
    mask = np.empty((batch_size, new, visible), dtype=np.bool_)
    mask[:] = (slots < starts)[:, None]
    tree = ancestors.numpy()
    for row, start in enumerate(lengths):
        mask[row, :, start : start + count] = tree[row]
    if window is not None:
        of_tree = positions.numpy()
        slot_positions = np.repeat(slots[None], batch_size, axis=0)
        for row, start in enumerate(lengths):
            slot_positions[row, start : start + count] = of_tree[row]
        mask &= of_tree[:, count - new :, None] - slot_positions[:, None] < window
    return torch.from_numpy(mask).unsqueeze(1)


def as_additive(mask: Tensor, dtype: torch.dtype, *, on_host: bool = False) -> Tensor:
    """Returns the mask as eager attention adds it: 0 where it is True, the lowest number else.

    Args:
        mask: bool.
        dtype: of the result.
        on_host: whether the mask is on the host and nobody records what is done with it.
    """
    if on_host and dtype == torch.float32:  # numpy takes a quarter of the time
        return torch.from_numpy(np.where(mask.numpy(), _SEEN, _UNSEEN))
    # filled on the device: a copy from the host cannot be captured
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), lowest)
