"""Tree attention, row by row as it is defined: what the other implementations are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.tree_mask import unpack_ancestors


def tree_attention_reference(
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

    Computes in float64 if the inputs are float64, else in float32. It reads the lengths on the
    host, and repeats keys and values for the query heads that share them.
    """
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    bits = unpack_ancestors(ancestors, query.shape[2])
    output = query.new_zeros(query.shape)
    rows = zip(context_lengths.tolist(), num_nodes.tolist(), strict=True)
    for row, (length, nodes) in enumerate(rows):
        end = length + nodes
        queries = query[row, :, :nodes].to(compute)
        keys = key[row, :, :end].to(compute).repeat_interleave(group, dim=0)
        values = value[row, :, :end].to(compute).repeat_interleave(group, dim=0)
        scores = queries @ keys.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(~_sees(bits[row, :nodes, :nodes], length, sliding_window), -torch.inf)
        if sinks is not None:
            sink = sinks.to(compute).reshape(-1, 1, 1).expand(-1, nodes, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :end]
        output[row, :, :nodes] = (weights @ values).to(output.dtype)
    return output


def _sees(tree: Tensor, length: int, sliding_window: int | None) -> Tensor:
    """Returns ``[n, length + n]`` bool from the tree's own ``[n, n]``."""
    prefix = torch.ones(len(tree), length, dtype=torch.bool, device=tree.device)
    sees = torch.cat([prefix, tree], dim=1)
    if sliding_window is not None:
        node_positions = length + tree.sum(dim=1) - 1
        positions = torch.cat([torch.arange(length, device=tree.device), node_positions])
        sees &= positions > node_positions.unsqueeze(1) - sliding_window
    return sees
