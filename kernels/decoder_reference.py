"""Decoders of the Llama kind and their layers by torch's operators: what the C code computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

from specdec.kernels.decoded import Decoded, Selected
from specdec.kernels.layer_parts import (
    DecoderCall,
    Ends,
    LayerCall,
    LayerParts,
    Norm,
    Product,
)
from specdec.kernels.rms_norm import rms_norm
from specdec.kernels.weight_blocks import from_blocks


def layers_reference(layers: Sequence[LayerParts], call: LayerCall) -> Tensor:
    """Returns what `DecoderLayers.run` returns, and writes what it writes."""
    rows, caches = call.rows, call.caches
    for parts, keys, values in zip(layers, caches.keys, caches.values, strict=True):
        rows = _layer(parts, call, rows, (keys, values))
    return rows


def decoder_reference(ends: Ends, layers: Sequence[LayerParts], call: DecoderCall) -> Decoded:
    """Returns what `Decoder.run` returns, and writes what it writes."""
    rows = embedding(call.tokens, ends.embedding)
    cos, sin = call.cos, call.sin
    if cos.dim() == 2:
        own = call.positions[:, -rows.shape[1] :]
        cos, sin = cos[own], sin[own]
    mask = None if call.ancestors is None else _mask(call, call.ancestors)
    layer_call = LayerCall(rows, cos, sin, call.caches, call.starts, mask, call.visible)
    rows = layers_reference(layers, layer_call)
    rows = _normed(rows if call.keep is None else rows[:, call.keep], ends.norm)
    logits = rows if ends.head is None else _times(rows, ends.head)
    if not call.top_k:
        return Decoded(logits)
    batch, count, _ = logits.shape
    top = Selected(batch, count, call.top_k)
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    top.logits.copy_(values[..., : call.top_k])
    top.ids.copy_(ids[..., : call.top_k])
    return Decoded(logits, top)


def _mask(call: DecoderCall, ancestors: Tensor) -> Tensor:
    batch, nodes, tree = ancestors.shape
    mask = torch.full((batch, 1, nodes, call.visible), torch.finfo(torch.float32).min)
    for row, start in enumerate(call.starts):
        begin = start - (tree - nodes)
        end = begin + tree
        seen = torch.zeros(nodes, call.visible, dtype=torch.bool)
        seen[:, :begin], seen[:, begin:end] = True, ancestors[row]
        if call.window is not None:
            positions = torch.arange(call.visible)
            positions[begin:end] = call.positions[row]
            seen &= call.positions[row, tree - nodes :, None] - positions < call.window
        mask[row, 0].masked_fill_(seen, 0.0)
    return mask


def _layer(
    parts: LayerParts, call: LayerCall, rows: Tensor, cached: tuple[Tensor, Tensor]
) -> Tensor:
    mask, visible, angles = call.mask, call.visible, (call.cos, call.sin)
    batch, nodes, _ = rows.shape
    heads = _times(_normed(rows, parts.before), parts.joined).view(batch, nodes, -1, parts.width)
    counts = [parts.query_heads, parts.heads, parts.heads]
    query, key, value = torch.split(heads, counts, dim=2)
    query = _rotated(_normed(query, parts.query_norm), angles)
    key = _rotated(_normed(key, parts.key_norm), angles)
    for row, start in enumerate(call.starts):
        for cache, new in zip(cached, (key, value), strict=True):
            cache[row, :, start : start + nodes] = new[row].transpose(0, 1)
    keys, values = (cache[:, :, :visible] for cache in cached)
    attended = scaled_dot_product_attention(
        query.transpose(1, 2),
        keys,
        values,
        None if mask is None else mask[..., :visible],
        scale=parts.scale,
        enable_gqa=True,
    )
    rows = rows + _times(attended.transpose(1, 2).flatten(2), parts.output)
    gate, up = _times(_normed(rows, parts.between), parts.gates).chunk(2, dim=-1)
    return rows + _times(silu(gate) * up, parts.down)


def _times(rows: Tensor, product: Product) -> Tensor:
    return linear(rows, from_blocks(product.weight), product.bias)


def _normed(rows: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return rows
    return rms_norm(rows, norm.weight, eps=norm.eps, offset=norm.offset, impl="reference")


def _rotated(heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Returns ``[B, N, heads, D]`` rotated."""
    cos, sin = (angle.unsqueeze(2) for angle in angles)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin
