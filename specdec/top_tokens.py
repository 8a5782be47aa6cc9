"""The likeliest tokens behind the nodes of a step's trees, selected once for all who ask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kernels.top_k_rows import takes_first, top_k_rows, top_k_rows_native
from specdec.types import TopTokens

_MOST_COPIED = 1 << 20  # entries; 4 MB of float32, what fits in the caches of one core


def top_tokens(trees: Sequence[Tensor], k: int) -> list[TopTokens]:
    """Returns the k likeliest tokens behind the nodes of several trees.

    Args:
        trees: ``[n, V]`` logits of the nodes of each.
        k: at most V.
    """
    first = takes_first(trees[0], k)
    # one selection for all small trees: its launches cost more than the copy
    if len(trees) > 1 and sum(map(Tensor.numel, trees)) <= _MOST_COPIED:
        logits, ids = top_k_rows(torch.cat(list(trees)), k)
        sizes = list(map(len, trees))
        both = torch.split(ids.cpu(), sizes), torch.split(logits.cpu(), sizes)
        parts = list(zip(*both, strict=True))
    elif first:  # on the host already
        parts = [(ids, logits) for logits, ids in (top_k_rows_native(own, k) for own in trees)]
    else:
        selected = [top_k_rows(own, k) for own in trees]
        parts = [(ids.cpu(), logits.cpu()) for logits, ids in selected]
    if not first:
        return [TopTokens(ids, logits) for ids, logits in parts]
    return [TopTokens(ids, logits, _choices(ids, logits)) for ids, logits in parts]


def _choices(ids: Tensor, logits: Tensor) -> list[tuple[int, float]]:
    return list(zip(ids[:, 0].tolist(), logits[:, 0].tolist(), strict=True))
