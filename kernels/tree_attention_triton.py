"""Tree attention in Triton: a KV head's query heads in one tile, the slots split, a merge behind.

Imported inside functions only, since it imports triton.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from specdec.kernels.implementations import interpreting
from specdec.kernels.tree_attention_kernels import merge_kernel, partial_kernel
from specdec.kernels.tree_attention_tiles import choose_tile, count_splits, padded_width

_LOG2E = 1.4426950408889634
_MERGE_ROWS = 4
_INTERPRETED_MULTIPROCESSORS = 16  # no device to ask; few, since programs run one after another


def tree_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ancestors: Tensor,
    context_lengths: Tensor,
    num_nodes: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Returns ``[B, Hq, N, D]``; see `specdec.kernels.tree_attention.tree_attention`.

    Two launches, or one where the slots are not split. Lengths are read on the device and the
    launch depends on shapes alone, so that one captured graph serves every length.

    Args:
        query, key, value, ancestors, context_lengths, num_nodes: as there.
        scale, sliding_window, softcap, sinks: as there.
        num_splits: parts of the slots, instead of `count_splits`.

    Raises:
        ValueError: if the dtype is float64, or a head is too wide: 256 numbers, 128 in float32.
    """
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"impl='triton' takes float16, bfloat16 or float32; got {query.dtype}, for which there "
            "are 'torch' and 'reference'"
        )
    batch_size, num_heads, nodes, width = query.shape
    kv_heads, slots = key.shape[1:3]
    group = num_heads // kv_heads
    padded = padded_width(width, query.element_size())
    # interpreted, a small tile would only mean more programs, one after another
    itemsize = 2 if interpreting() else query.element_size()
    tile = choose_tile(nodes * group, padded, itemsize)
    blocks = triton.cdiv(nodes * group, tile.block_m)
    pairs = batch_size * kv_heads
    if num_splits is None:
        seen = slots if sliding_window is None else min(slots, sliding_window + nodes)
        num_splits = count_splits(blocks * pairs, seen, tile, _num_multiprocessors(query.device))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    scratch = (num_splits, pairs, nodes * group) if num_splits > 1 else (0, 0, 0)
    partial = torch.empty((*scratch, padded), dtype=torch.float32, device=query.device)
    lse = torch.empty(scratch, dtype=torch.float32, device=query.device)
    ancestors = ancestors.contiguous()
    context_lengths, num_nodes = context_lengths.contiguous(), num_nodes.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    if softcap is None:
        factor, cap = scale * _LOG2E, 0.0
    else:  # the exponent of tanh's exp2
        factor, cap = 2.0 * _LOG2E * scale / softcap, softcap * _LOG2E
    window = 0 if sliding_window is None else sliding_window
    shared = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "SPLITS": num_splits,
        "WINDOWED": sliding_window is not None,
        "SINKS": sinks is not None,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": padded,
    }
    partial_kernel[(blocks, pairs, num_splits)](
        query, key, value, ancestors, context_lengths, num_nodes, sinks, output, partial, lse,
        factor, cap, window, nodes, width,
        *query.stride(), *key.stride(), *value.stride(), *output.stride(),
        WORDS=ancestors.shape[2], CAPPED=softcap is not None, SINGLE=query.dtype == torch.float32,
        # the interpreter holds bfloat16 as integers and would multiply these
        UPCAST=interpreting(), PADDED=width != padded, BLOCK_M=tile.block_m,
        BLOCK_T=tile.block_t,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **shared,
    )  # fmt: skip
    if num_splits > 1:
        merge_kernel[(triton.cdiv(nodes * group, _MERGE_ROWS), pairs)](
            partial, lse, context_lengths, num_nodes, sinks, output,
            window, nodes, width, *output.stride(), ROWS=_MERGE_ROWS, num_warps=4, **shared,
        )  # fmt: skip
    return output


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
