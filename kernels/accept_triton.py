"""Choices at every node of a batch of trees, and the walk along them, in Triton.

Imported inside functions only, since it imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.philox_triton import gumbel

_COUNTERS = 1024  # of Philox, each for four tokens: one program takes 4096 logits


@triton.jit
def _choice_kernel(
    logits_ptr, parents_ptr, nodes_ptr, keys_ptr, best_ptr, token_ptr,
    N, VOCAB, BLOCKS, temperature, s_b, s_n, s_v,
    NOISE: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """The largest noisy logit of one block of one node's row; token -1 if one of them is NaN."""
    block, node, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if node < tl.load(nodes_ptr + batch):
        counter = block * COUNTERS + tl.arange(0, COUNTERS)
        row = logits_ptr + batch.to(tl.int64) * s_b + node.to(tl.int64) * s_n
        if NOISE:
            depth = 0
            up = tl.load(parents_ptr + batch * N + node)
            while up >= 0:
                depth += 1
                up = tl.load(parents_ptr + batch * N + up)
            seed = tl.load(keys_ptr + 4 * batch)
            number = (tl.load(keys_ptr + 4 * batch + 1) & 0xFFFFFFFF).to(tl.uint32)
            position = tl.load(keys_ptr + 4 * batch + 2) + depth + 1
            position = (position & 0xFFFFFFFF).to(tl.uint32)
            nonce = (tl.load(keys_ptr + 4 * batch + 3) & 0xFFFFFFFF).to(tl.uint32)
            bits0, bits1, bits2, bits3 = tl.philox(
                seed, counter.to(tl.uint32), position, number, nonce
            )
        best = tl.full([COUNTERS], -float("inf"), tl.float64)
        chosen = tl.zeros([COUNTERS], tl.int32)
        broken = tl.zeros([COUNTERS], tl.int32)
        for lane in tl.static_range(4):
            token = counter * 4 + lane
            inside = token < VOCAB
            logit = tl.load(row + token.to(tl.int64) * s_v, mask=inside, other=-float("inf"))
            logit = logit.to(tl.float32)
            broken = broken | (logit != logit).to(tl.int32)
            score = logit.to(tl.float64)
            if NOISE:
                # rounded as torch rounds; the GPU's own quotient may be off by a bit or two
                score = tl.div_rn(logit, temperature).to(tl.float64)
                if lane == 0:
                    score += gumbel(bits0)
                elif lane == 1:
                    score += gumbel(bits1)
                elif lane == 2:
                    score += gumbel(bits2)
                else:
                    score += gumbel(bits3)
            # an earlier lane is a lower id of the same counter
            better = score > best
            best = tl.where(better, score, best)
            chosen = tl.where(better, token, chosen)
        largest = tl.max(best, 0)
        first = tl.min(tl.where(best == largest, chosen, 2147483647), 0)
        first = tl.where(tl.max(broken, 0) > 0, -1, first)
        at = (batch.to(tl.int64) * N + node) * BLOCKS + block
        tl.store(best_ptr + at, largest)
        tl.store(token_ptr + at, first)


@triton.jit
def _walk_kernel(
    best_ptr, token_ptr, tokens_ptr, parents_ptr, nodes_ptr, paths_ptr, counts_ptr, next_ptr,
    N, BLOCKS, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Joins the blocks of the nodes on one row's path, and walks."""
    batch = tl.program_id(0)
    count = tl.load(nodes_ptr + batch)
    nodes = tl.arange(0, BLOCK_N)
    parents = tl.load(parents_ptr + batch * N + nodes, mask=nodes < count, other=-2)
    tokens = tl.load(tokens_ptr + batch * N + nodes, mask=nodes < count, other=-2)
    blocks = tl.arange(0, BLOCK_B)
    path = tl.full([BLOCK_N], -1, tl.int32)
    node, depth, token = 0, 0, -1
    while node >= 0:
        at = (batch.to(tl.int64) * N + node) * BLOCKS + blocks
        best = tl.load(best_ptr + at, mask=blocks < BLOCKS, other=-float("inf"))
        chosen = tl.load(token_ptr + at, mask=blocks < BLOCKS, other=2147483647)
        largest = tl.max(best, 0)
        token = tl.min(tl.where(best == largest, chosen, 2147483647), 0)
        # no block may have met NaN, and some logit must be above minus infinity
        token = tl.where((tl.min(chosen, 0) < 0) | (largest == -float("inf")), -1, token)
        follows = (parents == node) & (tokens == token.to(tl.int64)) & (token >= 0)
        child = tl.min(tl.where(follows, nodes, BLOCK_N), 0)
        found = child < BLOCK_N
        path = tl.where(found & (nodes == depth), child, path)
        depth += found.to(tl.int32)
        node = tl.where(found, child, -1)
    tl.store(paths_ptr + batch * N + nodes, path, mask=nodes < N)
    tl.store(counts_ptr + batch, depth)
    tl.store(next_ptr + batch, tl.cast(token, tl.int64))


def accept_tree_triton(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    noise_keys: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `specdec.kernels.accept.accept_tree` says, in two launches.

    Raises:
        ValueError: if the logits are float64.
    """
    if logits.dtype == torch.float64:
        raise ValueError("impl='triton' takes logits of up to 32 bits; got torch.float64")
    batch_size, nodes, vocab_size = logits.shape
    blocks = triton.cdiv(vocab_size, 4 * _COUNTERS)
    device = logits.device
    best = torch.empty((batch_size, nodes, blocks), dtype=torch.float64, device=device)
    token = torch.empty((batch_size, nodes, blocks), dtype=torch.int32, device=device)
    paths = torch.empty((batch_size, nodes), dtype=torch.int32, device=device)
    counts = torch.empty(batch_size, dtype=torch.int32, device=device)
    next_tokens = torch.empty(batch_size, dtype=torch.int64, device=device)
    parents, num_nodes = parents.contiguous(), num_nodes.contiguous()
    keys = None if noise_keys is None else noise_keys.contiguous()
    _choice_kernel[(blocks, nodes, batch_size)](
        logits, parents, num_nodes, keys, best, token,
        nodes, vocab_size, blocks, float(temperature), *logits.stride(),
        NOISE=keys is not None, COUNTERS=_COUNTERS, num_warps=8,
    )  # fmt: skip
    _walk_kernel[(batch_size,)](
        best, token, tokens.contiguous(), parents, num_nodes, paths, counts, next_tokens,
        nodes, blocks,
        BLOCK_B=triton.next_power_of_2(blocks), BLOCK_N=triton.next_power_of_2(nodes), num_warps=1,
    )  # fmt: skip
    return paths, counts, next_tokens
