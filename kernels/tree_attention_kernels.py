"""The kernels behind `tree_attention_triton`: one part of the slots, and the merge of the parts.

Imported inside functions only, since it imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _popcount(x):
    # by hand: Triton has it only in the device library, which the interpreter lacks
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _depths(ancestors, node, live, WORDS: tl.constexpr):
    """Number of ancestor bits less one, for a vector of nodes."""
    bits = tl.zeros_like(node)
    for word in tl.static_range(WORDS):
        bits += _popcount(tl.load(ancestors + node * WORDS + word, mask=live, other=0))
    return bits - 1


@triton.jit
def _split_bounds(
    context, total, window, WINDOWED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """First slot that any node sees, rounded down to a block, and the slots of one split."""
    first = 0
    if WINDOWED:
        first = tl.maximum(context + 1 - window, 0) // BLOCK_N * BLOCK_N
    each = tl.cdiv(tl.maximum(tl.cdiv(total - first, SPLITS), 1), BLOCK_N) * BLOCK_N
    return first, each


@triton.jit
def _rescale(largest, new):
    """exp2(largest - new) where both may be minus infinity."""
    return tl.exp2(largest - tl.where(new == -float("inf"), 0.0, new))


@triton.jit
def _attend(
    q, k, v, visible, largest, weight, acc, scale, cap,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in powers of two; `scale` and `cap` contain log2(e)."""
    if SINGLE:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    else:
        scores = tl.dot(q, tl.trans(k)) * scale
    if CAPPED:
        # tanh from exp2: tanh(x) = 1 - 2 / (1 + e^2x), right at both ends
        scores = cap - 2.0 * cap / (1.0 + tl.exp2(scores))
    if MASKED:
        scores = tl.where(visible, scores, -float("inf"))
    new = tl.maximum(largest, tl.max(scores, 1))
    probs = tl.exp2(scores - tl.where(new == -float("inf"), 0.0, new)[:, None])
    shrink = _rescale(largest, new)
    weight = weight * shrink + tl.sum(probs, 1)
    acc = acc * shrink[:, None]
    if SINGLE:
        acc = tl.dot(probs, v, acc, input_precision="ieee")
    else:
        acc = tl.dot(probs.to(v.dtype), v, acc)
    return new, weight, acc


@triton.jit
def _with_sink(largest, weight, acc, sink):
    """Lets a logit without a value take part in the softmax; `sink` contains log2(e)."""
    new = tl.maximum(largest, sink)
    shrink = _rescale(largest, new)
    return weight * shrink + tl.exp2(sink - new), acc * shrink[:, None]


@triton.jit
def partial_kernel(
    q_ptr, k_ptr, v_ptr, ancestors_ptr, context_ptr, nodes_ptr, sinks_ptr,
    out_ptr, partial_ptr, lse_ptr,
    scale, cap, window, N, WIDTH,
    q_b, q_h, q_n, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, o_b, o_h, o_n, o_d,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    SINGLE: tl.constexpr, UPCAST: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attends with one block of rows of one KV head over one split of the slots."""
    # row blocks come first: programs that share keys and values run together and find them in L2
    pair, split = tl.program_id(1), tl.program_id(2)
    batch, kv_head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
    context = tl.load(context_ptr + batch)
    count = tl.load(nodes_ptr + batch)
    total = context + count
    first, each = _split_bounds(context, total, window, WINDOWED, SPLITS, BLOCK_N)
    begin = first + split * each
    end = tl.minimum(begin + each, total)
    # a block of rows without nodes has nothing to read
    end = tl.where(tl.program_id(0) * BLOCK_M < count * GROUP, end, begin)

    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    node, head = row // GROUP, kv_head * GROUP + row % GROUP
    live = node < count
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    q_at = q_ptr + batch * q_b + head[:, None] * q_h + node[:, None] * q_n + d[None, :] * q_d
    q = tl.load(q_at, mask=live[:, None] & (d < WIDTH)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    # one 64-bit base and 32-bit offsets: a tile of 64-bit addresses would fill the registers
    k_head = k_ptr + batch * k_b + kv_head.to(tl.int64) * k_h
    v_head = v_ptr + batch * v_b + kv_head.to(tl.int64) * v_h
    k_at = n[:, None] * k_s + d[None, :] * k_d
    v_at = n[:, None] * v_s + d[None, :] * v_d
    ancestors = ancestors_ptr + batch * N * WORDS
    depth = tl.zeros_like(node)
    if WINDOWED:
        depth = _depths(ancestors, node, live, WORDS)

    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # whole blocks of the prefix: all of it is seen, but for a window
    prefix_end = tl.maximum(tl.minimum(end, context // BLOCK_N * BLOCK_N), begin)
    for slot in range(begin, prefix_end, BLOCK_N):
        if PADDED:
            inside = (d < WIDTH)[None, :]
            k = tl.load(
                k_head + tl.to_tensor(slot).to(tl.int64) * k_s + k_at, mask=inside, other=0.0
            )
            v = tl.load(
                v_head + tl.to_tensor(slot).to(tl.int64) * v_s + v_at, mask=inside, other=0.0
            )
        else:
            k = tl.load(k_head + tl.to_tensor(slot).to(tl.int64) * k_s + k_at)
            v = tl.load(v_head + tl.to_tensor(slot).to(tl.int64) * v_s + v_at)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        near = True
        if WINDOWED:
            near = (context + depth)[:, None] - (slot + n)[None, :] < window
        largest, weight, acc = _attend(
            q, k, v, near, largest, weight, acc, scale, cap, WINDOWED, CAPPED, SINGLE
        )
    t = tl.arange(0, BLOCK_T)
    k_tail = t[:, None] * k_s + d[None, :] * k_d
    v_tail = t[:, None] * v_s + d[None, :] * v_d
    # the block in which the prefix ends, and the tree; more stages would take buffers of their own
    for slot in tl.range(prefix_end, end, BLOCK_T, num_stages=1):
        used = (slot + t) < total
        inside = used[:, None] & (d < WIDTH)[None, :]
        k = tl.load(k_head + tl.to_tensor(slot).to(tl.int64) * k_s + k_tail, mask=inside, other=0.0)
        v = tl.load(v_head + tl.to_tensor(slot).to(tl.int64) * v_s + v_tail, mask=inside, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        place = slot + t - context
        in_tree = used & (place >= 0)
        words = tl.load(
            ancestors + node[:, None] * WORDS + (place >> 5)[None, :],
            mask=live[:, None] & in_tree[None, :],
            other=0,
        )
        visible = (place < 0)[None, :] | (((words >> (place & 31)[None, :]) & 1) != 0)
        if WINDOWED:
            behind = tl.where(in_tree, _depths(ancestors, place, in_tree, WORDS), place)
            visible = visible & (depth[:, None] - behind[None, :] < window)
        largest, weight, acc = _attend(
            q, k, v, visible & used[None, :], largest, weight, acc, scale, cap, True, CAPPED, SINGLE
        )

    if SPLITS == 1:
        if SINKS:
            sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
            weight, acc = _with_sink(largest, weight, acc, sink)
        out = acc / tl.where(live, weight, 1.0)[:, None]
        out = tl.where(live[:, None], out, 0.0)
        out_at = (
            out_ptr + batch * o_b + head[:, None] * o_h + node[:, None] * o_n + d[None, :] * o_d
        )
        inside = (node < N)[:, None] & (d < WIDTH)[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
    elif begin < total:
        rows = (tl.to_tensor(split).to(tl.int64) * tl.num_programs(1) + pair) * N * GROUP + row
        seen = weight > 0.0
        tl.store(lse_ptr + rows, largest + tl.log2(tl.where(seen, weight, 1.0)), mask=live)
        part = acc / tl.where(seen, weight, 1.0)[:, None]
        inside = live[:, None] & (d < WIDTH)[None, :]
        tl.store(partial_ptr + rows[:, None] * BLOCK_D + d[None, :], part, mask=inside)


@triton.jit
def merge_kernel(
    partial_ptr, lse_ptr, context_ptr, nodes_ptr, sinks_ptr, out_ptr,
    window, N, WIDTH, o_b, o_h, o_n, o_d,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr,
    SINKS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Joins the splits of a few rows by their log-sum-exp."""
    pair = tl.program_id(1)
    batch, kv_head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
    context = tl.load(context_ptr + batch)
    count = tl.load(nodes_ptr + batch)
    total = context + count
    first, each = _split_bounds(context, total, window, WINDOWED, SPLITS, BLOCK_N)
    used = tl.cdiv(total - first, each)  # the others were not written
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    node, head = row // GROUP, kv_head * GROUP + row % GROUP
    live = node < count
    d = tl.arange(0, BLOCK_D)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for split in range(used):
        rows = (tl.to_tensor(split).to(tl.int64) * tl.num_programs(1) + pair) * N * GROUP + row
        lse = tl.load(lse_ptr + rows, mask=live, other=-float("inf"))
        inside = live[:, None] & (d < WIDTH)[None, :]
        part = tl.load(partial_ptr + rows[:, None] * BLOCK_D + d[None, :], mask=inside, other=0.0)
        new = tl.maximum(largest, lse)
        shrink, share = _rescale(largest, new), _rescale(lse, new)
        weight = weight * shrink + share
        acc = acc * shrink[:, None] + part * share[:, None]
        largest = new
    inside = (node < N)[:, None] & (d < WIDTH)[None, :]
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=node < N, other=0.0).to(tl.float32)
        weight, acc = _with_sink(largest, weight, acc, sink * 1.4426950408889634)
    out = tl.where(live[:, None], acc / tl.where(live, weight, 1.0)[:, None], 0.0)
    out_at = out_ptr + batch * o_b + head[:, None] * o_h + node[:, None] * o_n + d[None, :] * o_d
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
