"""Attention of a draft tree over its cache: a prefix that every node sees, and the tree itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.kernels.implementations import resolve
from specdec.kernels.tree_attention_reference import tree_attention_reference
from specdec.kernels.tree_attention_tiles import WIDEST_HALF
from specdec.kernels.tree_attention_torch import tree_attention_torch
from specdec.kernels.tree_mask import num_words, unpack_ancestors

IMPLEMENTATIONS = ("torch", "triton", "reference")
_HALVES = (torch.float16, torch.bfloat16)


def tree_attention(
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
    impl: str = "auto",
    check_values: bool | None = None,
) -> Tensor:
    """Returns ``[B, Hq, N, D]`` in the dtype of `query`: each node attends to what it sees.

    Row b's prefix stands at slots ``0 .. context_lengths[b]`` of the cache and its tree's keys and
    values, already written, at the ``num_nodes[b]`` slots behind. A node sees the prefix and the
    nodes of its ancestor bits; its position is the context length plus its depth, and its depth is
    the number of its ancestor bits less one. Slots past the tree are never used and may hold NaN,
    and so may queries past ``num_nodes[b]``, whose output is zero.

    Source: split keys and a merge by log-sum-exp are flash-decoding's (Dao et al., 2023), query
    heads packed into rows of their KV head FlashInfer's (Ye et al., arXiv 2501.01005). Unlike
    theirs the mask is bits of the tree alone, looked at only behind the prefix.

    Args:
        query: ``[B, Hq, N, D]`` float16, bfloat16 or float32 (float64 too but for "triton"), any
            strides. Query head h reads KV head ``h // (Hq / Hkv)``.
        key: ``[B, Hkv, S, D]``, same dtype, any strides.
        value: ``[B, Hkv, S, D]``, same dtype, any strides.
        ancestors: ``[B, N, W]`` int32 of `specdec.kernels.tree_mask.pack_ancestors`.
        context_lengths: ``[B]`` int32 slots before the tree, 0 or more.
        num_nodes: ``[B]`` int32 nodes of each row's tree, 0 to N.
        scale: factor of the products of queries and keys.
        sliding_window: a node sees only positions greater than its own minus this; None for all.
        softcap: scores become ``softcap * tanh(score / softcap)``; None for no cap.
        sinks: ``[Hq]`` floating point: for each query head a logit that takes part in the softmax
            and has no value (GPT-OSS); not capped. None for none.
        impl: "triton"; "torch"; "reference"; or "auto": "triton" on a GPU for half precision and
            D up to 256 where triton is installed, "torch" else.
        check_values: whether lengths and bits are checked too, which reads them on the host. None:
            on the CPU only, since elsewhere that waits for the device. Unchecked wrong values
            read and write outside of the tensors.

    Raises:
        ValueError: if shapes, dtypes, devices or checked values do not fit one another.
        ImportError: if "triton" is asked for and is not installed.
    """
    _check(query, key, value, ancestors, context_lengths, num_nodes, sinks)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 or None; got {sliding_window}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap must be positive or None; got {softcap}")
    if check_values or (check_values is None and query.device.type == "cpu"):
        _check_values(ancestors, context_lengths, num_nodes, key.shape[2])
    attend: Callable[..., Tensor]
    fast = query.dtype in _HALVES and query.shape[3] <= WIDEST_HALF
    chosen = resolve(impl, "tree_attention", IMPLEMENTATIONS, query, fast=fast)
    if chosen == "triton":
        # here and not above: this module imports triton
        from specdec.kernels.tree_attention_triton import tree_attention_triton

        attend = tree_attention_triton
    else:
        attend = tree_attention_torch if chosen == "torch" else tree_attention_reference
    return attend(
        query,
        key,
        value,
        ancestors,
        context_lengths,
        num_nodes,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ancestors: Tensor,
    context_lengths: Tensor,
    num_nodes: Tensor,
    sinks: Tensor | None,
) -> None:
    """Checks what is known without a look at the device."""
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query must be [B, Hq, N, D] and key [B, Hkv, S, D]; got {_shapes(query, key)}"
        )
    batch_size, num_heads, nodes, width = query.shape
    num_kv_heads, slots = key.shape[1:3]
    if min(query.shape) < 1 or num_kv_heads < 1:
        raise ValueError(f"no dimension of query may be empty; got {_shapes(query, key)}")
    if key.shape != (batch_size, num_kv_heads, slots, width) or num_heads % num_kv_heads:
        raise ValueError(
            "key must be [B, Hkv, S, D] with B and D of query, and Hkv a divisor of its Hq; got "
            f"{_shapes(query, key)}"
        )
    if value.shape != key.shape:
        raise ValueError(
            f"value must have the shape of key, {tuple(key.shape)}; got {_shapes(value)}"
        )
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "query, key and value must have one floating dtype; got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    expected = {
        "ancestors": (ancestors, (batch_size, nodes, num_words(nodes))),
        "context_lengths": (context_lengths, (batch_size,)),
        "num_nodes": (num_nodes, (batch_size,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape or tensor.dtype != torch.int32:
            raise ValueError(
                f"{name} must be {list(shape)} int32; got {list(tensor.shape)} {tensor.dtype}"
            )
    if sinks is not None and (sinks.shape != (num_heads,) or not sinks.is_floating_point()):
        raise ValueError(
            f"sinks must be [{num_heads}] floating point; got {list(sinks.shape)} {sinks.dtype}"
        )
    tensors = [
        key,
        value,
        ancestors,
        context_lengths,
        num_nodes,
        *([] if sinks is None else [sinks]),
    ]
    if any(tensor.device != query.device for tensor in tensors):
        raise ValueError(
            f"all tensors must be on the device of query, {query.device}; got "
            f"{sorted({str(tensor.device) for tensor in tensors})}"
        )


def _check_values(
    ancestors: Tensor, context_lengths: Tensor, num_nodes: Tensor, slots: int
) -> None:
    nodes = ancestors.shape[1]
    rows = zip(context_lengths.tolist(), num_nodes.tolist(), strict=True)
    for row, (length, count) in enumerate(rows):
        if not 0 <= count <= nodes:
            raise ValueError(f"num_nodes must be 0 to N = {nodes}; row {row} has {count}")
        if length < 0 or length + count > slots:
            raise ValueError(
                f"context length and nodes must fit the {slots} slots of the cache; row {row} has "
                f"{length} and {count}"
            )
    live = torch.arange(nodes, device=num_nodes.device) < num_nodes.unsqueeze(1)
    bits = unpack_ancestors(ancestors, 32 * ancestors.shape[2])
    own = torch.eye(nodes, bits.shape[2], dtype=torch.bool, device=bits.device)
    above = torch.ones(nodes, bits.shape[2], dtype=torch.bool, device=bits.device).triu(1)
    wrong = ((bits & above) | (own & ~bits)).any(-1) & live
    if bool(wrong.any()):
        row, node = wrong.nonzero()[0].tolist()
        seen = bits[row, node].nonzero().flatten().tolist()
        raise ValueError(
            "a node must see itself and otherwise only nodes before it: ancestor bits up to and "
            f"including its own; node {node} of row {row} has the bits {seen}"
        )


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
