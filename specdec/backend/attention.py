"""Attention of a few query rows over a long cache, without a copy of the cache for each query head.

HuggingFace's "sdpa" repeats keys and values for every query head of a group as soon as there is a
mask, and a bool mask is turned into numbers in every layer. Both cost more than the attention
itself when a handful of tree nodes look at a long prefix on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

GROUPED = "specdec_grouped"
_FOLDED_ROWS = 64  # more rows a head than this are dear to fold, and repeat nothing that matters


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Does what transformers' "sdpa" does, the query heads of a group as further rows of one head.

    Args:
        module: the attention layer.
        query: ``[B, Hq, N, D]``.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, D]``.
        attention_mask: ``[B, 1, N, S]``, additive; anything else is left to "sdpa".
        dropout: probability, 0 outside training.
        scaling: factor of the scores, None for ``D ** -0.5``.
        is_causal: as "sdpa" takes it.
        **kwargs: of the model; a position bias or softcap is left to "sdpa".

    Returns:
        ``[B, N, Hq, D]``, and None in place of weights.
    """
    extra = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    if extra or attention_mask is None or attention_mask.shape[1] != 1 or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    fold = groups > 1 and 1 < rows <= _FOLDED_ROWS
    if fold:
        query = query.reshape(batch, key.shape[1], groups * rows, width)
        # `repeat` of so little takes ten times as long
        attention_mask = attention_mask.expand(-1, groups, -1, -1).reshape(
            attention_mask.shape[0], 1, groups * rows, -1
        )
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=not fold
    )
    if fold:
        output = output.reshape(batch, heads, rows, value.shape[-1])
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)


@contextmanager
def attention_of(config: Any, implementation: str | None, own: str) -> Iterator[None]:
    """Has the layers of a model use another attention; None leaves it as it is.

    Passes in several threads may overlap: then the first to end gives the layers their own
    attention back, which computes the same under the same masks.

    Args:
        config: the text model's, which its attention layers look at in every pass.
        implementation: a name registered with `transformers.AttentionInterface`.
        own: the model's own, to be put back.
    """
    if implementation is None:
        yield
        return
    config._attn_implementation_internal = implementation
    try:
        yield
    finally:
        config._attn_implementation_internal = own


def pays(device: torch.device, attention: str) -> bool:
    """Returns whether `grouped_attention` is worth it: on a CPU, in place of "sdpa"."""
    return device.type == "cpu" and attention == "sdpa"
