"""Gumbel top-k in Triton: the best of each block with its noise, then the best of these.

Imported inside functions only, since it imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.top_k_triton import best_of_blocks, next_best


@triton.jit
def _merge_kernel(values_ptr, ids_ptr, out_ptr, scores_ptr, K, COUNT, BLOCK: tl.constexpr):
    """The k best candidates of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(values_ptr + row * COUNT + at, mask=at < COUNT, other=-float("inf"))
    ids = tl.load(ids_ptr + row * COUNT + at, mask=at < COUNT, other=2147483647)
    broken = tl.min(ids, 0) < 0
    live = ids < 2147483647
    for place in range(K):
        largest, chosen = next_best(values, ids, live)
        live = live & (ids != chosen)
        none = broken | (chosen == 2147483647)
        tl.store(out_ptr + row * K + place, tl.where(none, -1, chosen).to(tl.int64))
        tl.store(scores_ptr + row * K + place, tl.where(none, -float("inf"), largest))


def gumbel_top_k_triton(log_probs: Tensor, noise_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Does what `specdec.kernels.gumbel_top_k.gumbel_top_k` says, in two launches.

    Raises:
        ValueError: for log-probabilities of 64 bits, or more than 64 draws.
    """
    candidates = best_of_blocks(log_probs, k, noise_keys)
    rows, count = candidates.ids.shape
    ids = torch.empty((rows, k), dtype=torch.int64, device=log_probs.device)
    scores = torch.empty((rows, k), dtype=torch.float64, device=log_probs.device)
    _merge_kernel[(rows,)](
        candidates.values, candidates.ids, ids, scores, k, count,
        BLOCK=triton.next_power_of_2(count), num_warps=4,
    )  # fmt: skip
    return ids, scores
