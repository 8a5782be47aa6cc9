"""Token recycling's table in Triton: the best of each block, then the best of these, scattered.

Imported inside functions only, since it imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.top_k_triton import best_of_blocks, next_best


@triton.jit
def _scatter_kernel(
    values_ptr, ids_ptr, tokens_ptr, table_ptr, shares_ptr,
    N, K, COUNT, t_n, t_k, s_n, s_k,
    SHARES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of logits into the row of its token, unless a later one has the same token."""
    row = tl.program_id(0)
    token = tl.load(tokens_ptr + row)
    later = 0
    for begin in range(row + 1, N, BLOCK_N):
        others = begin + tl.arange(0, BLOCK_N)
        same = tl.load(tokens_ptr + others, mask=others < N, other=-1) == token
        later += tl.sum(same.to(tl.int32), 0)
    if (token >= 0) & (later == 0):
        at = tl.arange(0, BLOCK)
        base = row.to(tl.int64) * COUNT + at
        values = tl.load(values_ptr + base, mask=at < COUNT, other=-float("inf"))
        ids = tl.load(ids_ptr + base, mask=at < COUNT, other=2147483647)
        live = ids < 2147483647
        places = tl.arange(0, BLOCK_K)
        kept = tl.full([BLOCK_K], -float("inf"), tl.float32)
        for place in range(K):
            largest, chosen = next_best(values, ids, live)
            live = live & (ids != chosen)
            kept = tl.where(places == place, largest, kept)
            tl.store(table_ptr + token * t_n + place * t_k, chosen)
        if SHARES:
            top = tl.max(kept, 0)
            shares = kept - top - tl.log(tl.sum(tl.exp(kept - top), 0))
            out = shares_ptr + token * s_n + places * s_k
            tl.store(out, shares.to(tl.float16), mask=places < K)


def recycle_triton(
    successors: Tensor, logits: Tensor, tokens: Tensor, log_shares: Tensor | None
) -> None:
    """Does what `specdec.kernels.recycle.recycle` says, in two launches.

    Raises:
        ValueError: for logits of 64 bits, or more than 64 successors.
    """
    k = successors.shape[1]
    tokens = tokens.contiguous()
    candidates = best_of_blocks(logits, k, used=tokens)
    rows, count = candidates.ids.shape
    strides = (0, 0) if log_shares is None else log_shares.stride()
    _scatter_kernel[(rows,)](
        candidates.values, candidates.ids, tokens, successors, log_shares,
        rows, k, count, *successors.stride(), *strides,
        SHARES=log_shares is not None, BLOCK_N=min(triton.next_power_of_2(rows), 1024),
        BLOCK=triton.next_power_of_2(count), BLOCK_K=triton.next_power_of_2(k), num_warps=4,
    )  # fmt: skip
