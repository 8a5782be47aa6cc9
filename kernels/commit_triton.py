"""Path compaction in Triton, one launch for all layers, rows and heads.

Imported inside functions only, since it imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK_D = 64


@triton.jit
def _commit_kernel(
    pool_ptr, paths_ptr, counts_ptr, lengths_ptr,
    BATCH, HEADS, WIDTH, PATH, s_l, s_b, s_h, s_s, s_d,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All slots of one path in one layer and head, for a slice of the width."""
    program = tl.program_id(0)
    head, batch = program % HEADS, (program // HEADS) % BATCH
    layer = program // HEADS // BATCH
    count = tl.load(counts_ptr + batch)
    length = tl.load(lengths_ptr + batch)
    place = tl.arange(0, BLOCK_P)
    kept = place < count
    node = tl.load(paths_ptr + batch * PATH + place, mask=kept, other=0)
    # a path that lies in order is in place already
    if tl.max(tl.where(kept, node - place, 0), 0) > 0:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        base = pool_ptr + layer.to(tl.int64) * s_l + batch.to(tl.int64) * s_b
        base += head.to(tl.int64) * s_h + length.to(tl.int64) * s_s
        inside = kept[:, None] & (d < WIDTH)[None, :]
        states = tl.load(base + node[:, None] * s_s + d[None, :] * s_d, mask=inside)
        # a slot is the source of one place and the target of another, held by another thread
        tl.debug_barrier()
        tl.store(base + place[:, None] * s_s + d[None, :] * s_d, states, mask=inside)


def commit_paths_triton(pool: Tensor, paths: Tensor, counts: Tensor, lengths: Tensor) -> None:
    """Does what `specdec.kernels.commit.commit_paths` says."""
    layers, batch_size, heads, _, width = pool.shape
    if 0 in pool.shape or paths.shape[1] == 0:
        return
    grid = (layers * batch_size * heads, triton.cdiv(width, _BLOCK_D))
    _commit_kernel[grid](
        pool, paths.contiguous(), counts.contiguous(), lengths.contiguous(),
        batch_size, heads, width, paths.shape[1], *pool.stride(),
        BLOCK_P=triton.next_power_of_2(paths.shape[1]), BLOCK_D=_BLOCK_D, num_warps=4,
    )  # fmt: skip
