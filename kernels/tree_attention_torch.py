"""Tree attention with torch's own operations, without repeating keys and values."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from specdec.kernels.tree_mask import visible_slots


def tree_attention_torch(
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
) -> Tensor:
    """Returns ``[B, Hq, N, D]``; see `specdec.kernels.tree_attention.tree_attention`.

    The query heads that share a KV head become rows of one head, so that a single
    scaled_dot_product_attention serves them on keys and values as they lie. With `softcap` or
    `sinks`, which that has no room for, two matrix products and a softmax in float32.

    On the CPU the lengths are read, and each row of a ragged batch attends over its own slots only.
    Elsewhere nothing is read on the host: all S slots are attended over, and keys and values are
    copied, since an unused slot may hold NaN. Hand in a view of the slots that are in use.
    """
    attend = functools.partial(
        _attend, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
    )
    tree = (ancestors, context_lengths, num_nodes)
    if query.device.type != "cpu":
        slots = torch.arange(key.shape[2], device=key.device)
        unused = (slots >= (context_lengths + num_nodes).unsqueeze(1))[:, None, :, None]
        key, value = key.masked_fill(unused, 0), value.masked_fill(unused, 0)
        return attend(query, key, value, *tree)
    ends = (context_lengths + num_nodes).tolist()
    if len(set(ends)) == 1:
        return attend(query, key[:, :, : ends[0]], value[:, :, : ends[0]], *tree)
    rows = [
        attend(
            query[row : row + 1],
            key[row : row + 1, :, :end],
            value[row : row + 1, :, :end],
            ancestors[row : row + 1],
            context_lengths[row : row + 1],
            num_nodes[row : row + 1],
        )
        for row, end in enumerate(ends)
    ]
    return torch.cat(rows)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ancestors: Tensor,
    context_lengths: Tensor,
    num_nodes: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same over slots that all hold numbers."""
    batch_size, num_heads, nodes, width = query.shape
    if key.shape[2] == 0:  # no context and no nodes
        return query.new_zeros(query.shape)
    group = num_heads // key.shape[1]
    mask = visible_slots(ancestors, context_lengths, num_nodes, key.shape[2], sliding_window)
    # a row that sees nothing would be NaN; it is set to zero below
    live = mask.any(dim=-1)
    # and what it holds must not be: CPUs with tile registers read past a row's end, times zero
    query = query.masked_fill(~live[:, None, :, None], 0)
    folded = query.reshape(batch_size, key.shape[1], group * nodes, width)
    mask = (mask | ~live.unsqueeze(-1)).unsqueeze(1).repeat(1, 1, group, 1)
    if softcap is None and sinks is None:
        output = torch.nn.functional.scaled_dot_product_attention(
            folded, key, value, attn_mask=mask, scale=scale
        )
    else:
        scores = torch.matmul(folded, key.mT).to(_softmax_dtype(query.dtype)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            sink = sinks.to(scores.dtype).reshape(1, key.shape[1], group, 1, 1)
            sink = sink.expand(batch_size, -1, -1, nodes, 1).flatten(2, 3)
            weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        output = torch.matmul(weights.to(value.dtype), value)
    output = output.reshape(batch_size, num_heads, nodes, width)
    return output.masked_fill(~live[:, None, :, None], 0)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
