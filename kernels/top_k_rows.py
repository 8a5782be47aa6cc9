"""Top-k of every row of a wide matrix, through blocked maxima."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64
MOST_OF_TRITON = 64  # k of `top_k_triton`, which holds all blocks' candidates in registers


def top_k_rows(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns values and ids ``[N, k]`` of the k largest entries of each row, largest first.

    A row's k largest entries lie in the k blocks with the largest maxima, so one sweep of maxima
    and a small top-k replace a selection over the whole row.

    Args:
        logits: ``[N, V]`` floating point.
        k: at most V.
    """
    rows, width = logits.shape
    blocks = width // _BLOCK
    if blocks <= k:
        top = torch.topk(logits, k, dim=-1)
        return top.values, top.indices
    blocked = logits[:, : blocks * _BLOCK].reshape(rows, blocks, _BLOCK)
    best = torch.topk(blocked.amax(dim=-1), k, dim=-1).indices
    ids = best.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    ids = ids.flatten(1)
    tail = torch.arange(blocks * _BLOCK, width, device=logits.device).expand(rows, -1)
    ids = torch.cat([ids, tail], dim=-1)
    top = torch.topk(logits.gather(-1, ids), k, dim=-1)
    return top.values, ids.gather(-1, top.indices)
