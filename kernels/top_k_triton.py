"""Top-k of long rows in Triton, noisy ones too: each block's first, then the best of these.

Imported inside functions only, since it imports triton. k rounds of a maximum, since Triton's own
sort and top-k want the whole row in one program. The lowest id comes first among equals.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.philox_triton import gumbel
from specdec.kernels.top_k_rows import MOST_OF_TRITON

_COUNTERS = 1024  # of Philox, each for four tokens: one program takes 4096 scores
_NONE = tl.constexpr(2147483647)  # id of a candidate that a block does not have
_BROKEN = tl.constexpr(-2)  # first id of a block with NaN among what must have none


class Candidates(NamedTuple):
    """Each block's best entries of each row, ``[N, BLOCKS * K]``; see `best_of_blocks`."""

    values: Tensor
    ids: Tensor
    blocks: int


@triton.jit
def next_best(values, ids, live):
    """The largest of the live values and its id, the lowest of several; an id past all if none."""
    largest = tl.max(tl.where(live, values, -float("inf")), 0)
    chosen = tl.min(tl.where(live & (values == largest), ids, _NONE), 0)
    return largest, chosen


@triton.jit
def _block_kernel(
    scores_ptr, keys_ptr, used_ptr, best_ptr, ids_ptr, VOCAB, K, BLOCKS, s_n, s_v,
    NOISE: tl.constexpr, SOME: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """The k best of one block of one row, in order."""
    block, row = tl.program_id(0), tl.program_id(1)
    wanted = True
    if SOME:
        wanted = tl.load(used_ptr + row) >= 0
    if wanted:
        token = block * 4 * COUNTERS + tl.arange(0, 4 * COUNTERS)
        inside = token < VOCAB
        at = scores_ptr + row.to(tl.int64) * s_n + token.to(tl.int64) * s_v
        score = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
        out = (row.to(tl.int64) * BLOCKS + block) * K
        broken = False
        if NOISE:
            counter = block * COUNTERS + tl.arange(0, COUNTERS)
            seed = tl.load(keys_ptr + 4 * row)
            number = (tl.load(keys_ptr + 4 * row + 1) & 0xFFFFFFFF).to(tl.uint32)
            position = (tl.load(keys_ptr + 4 * row + 2) & 0xFFFFFFFF).to(tl.uint32)
            nonce = (tl.load(keys_ptr + 4 * row + 3) & 0xFFFFFFFF).to(tl.uint32)
            bits0, bits1, bits2, bits3 = tl.philox(
                seed, counter.to(tl.uint32), position, number, nonce
            )
            # the words of one counter belong to neighbouring tokens
            lanes = tl.join(tl.join(bits0, bits2), tl.join(bits1, bits3))
            value = score.to(tl.float64) + gumbel(tl.reshape(lanes, [4 * COUNTERS]))
            live = inside & (score > -float("inf"))
            broken = tl.max((score != score).to(tl.int32), 0) > 0
        else:
            value = tl.where(score == score, score, -float("inf"))
            live = inside
        for place in range(K):
            largest, chosen = next_best(value, token, live)
            live = live & (token != chosen)
            tl.store(best_ptr + out + place, largest)
            tl.store(ids_ptr + out + place, tl.where(broken, _BROKEN, chosen))


def best_of_blocks(
    scores: Tensor, k: int, noise_keys: Tensor | None = None, used: Tensor | None = None
) -> Candidates:
    """Returns the k best of every block of every row.

    Args:
        scores: ``[N, V]`` of up to 32 bits, any strides. Without noise NaN counts as minus
            infinity; with noise entries of minus infinity take no part, and a block with NaN has
            the ids -2.
        k: 1 to `MOST_OF_TRITON`.
        noise_keys: ``[N, 4]`` int64, see `specdec.kernels.gumbel_top_k`; None for no noise.
        used: ``[N]`` int64, negative for rows that are left out; None for none.

    Returns:
        Values float64 with noise, else float32, best first, and int32 ids; 2147483647 is none.

    Raises:
        ValueError: for scores of 64 bits, or another k.
    """
    if scores.dtype == torch.float64:
        raise ValueError("impl='triton' takes scores of up to 32 bits; got torch.float64")
    if k > MOST_OF_TRITON:
        raise ValueError(f"impl='triton' takes k up to {MOST_OF_TRITON}; got {k}")
    rows, vocab_size = scores.shape
    blocks = triton.cdiv(vocab_size, 4 * _COUNTERS)
    shape, device = (rows, blocks * k), scores.device
    dtype = torch.float32 if noise_keys is None else torch.float64
    values = torch.empty(shape, dtype=dtype, device=device)
    ids = torch.empty(shape, dtype=torch.int32, device=device)
    _block_kernel[(blocks, rows)](
        scores,
        None if noise_keys is None else noise_keys.contiguous(),
        None if used is None else used.contiguous(),
        values, ids, vocab_size, k, blocks, *scores.stride(),
        NOISE=noise_keys is not None, SOME=used is not None, COUNTERS=_COUNTERS, num_warps=8,
    )  # fmt: skip
    return Candidates(values, ids, blocks)
