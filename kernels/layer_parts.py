"""What a decoder of the Llama kind and its layers are made of, and what a pass hands to them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.weight_blocks import BlockWeight


class Norm(NamedTuple):
    """The arguments of `rms_norm` beside its rows."""

    weight: Tensor
    eps: float
    offset: float = 0.0


class Product(NamedTuple):
    """A linear layer: the weight ``[N, K]`` in blocks, and the bias ``[N]`` float32 or None."""

    weight: BlockWeight
    bias: Tensor | None = None


class LayerParts(NamedTuple):
    """What a layer is made of: H hidden numbers, Hq query heads and Hkv others of D, I inner ones.

    Attributes:
        joined: ``[(Hq + 2 Hkv) * D, H]``: queries, keys and values.
        output: ``[H, Hq * D]``.
        gates: ``[2 I, H]``: gate and up.
        down: ``[H, I]``.
        before: the norm of what goes into the attention.
        between: the norm of what goes into the gates.
        width: D, a multiple of 32.
        scale: of the scores.
        query_norm: of single heads, before they are rotated; None for none.
        key_norm: as `query_norm`, and there if that is, with equal eps and offset.
    """

    joined: Product
    output: Product
    gates: Product
    down: Product
    before: Norm
    between: Norm
    width: int
    scale: float
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    @property
    def query_heads(self) -> int:
        """Hq."""
        return self.output.weight.num_inputs // self.width

    @property
    def heads(self) -> int:
        """Hkv."""
        return (self.joined.weight.num_outputs // self.width - self.query_heads) // 2


class Ends(NamedTuple):
    """What stands around the layers of a decoder.

    Attributes:
        embedding: ``[V, H]`` float32 on the CPU, contiguous.
        norm: of what goes into the head.
        head: ``[V', H]``, V' logits of a node; None if somebody else multiplies with it.
    """

    embedding: Tensor
    norm: Norm
    head: Product | None


class LayerCaches:
    """Keys and values of some layers; what is known of them is looked up once, not in every pass.

    Args:
        keys: of each layer ``[B, Hkv, S, D]`` float32 on the CPU, of equal strides; slots of a head
            lie side by side. Written to.
        values: as `keys`.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.keys, self.values = tuple(keys), tuple(values)

    @cached_property
    def fit(self) -> bool:
        """Whether they are what the arguments say."""
        first, every = self.keys[0], (*self.keys, *self.values)
        return (
            len(self.keys) == len(self.values)
            and {(own.dtype, own.is_cpu) for own in every} == {(torch.float32, True)}
            and {(own.shape, own.stride()) for own in every} == {(first.shape, first.stride())}
            and first.dim() == 4
            and first.stride()[2:] == (first.shape[3], 1)
        )

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """B, Hkv, S and D."""
        return tuple(self.keys[0].shape)

    @cached_property
    def strides(self) -> tuple[int, int]:
        """Numbers from row to row, and from head to head."""
        row, head, *_ = self.keys[0].stride()
        return row, head

    @cached_property
    def pointers(self) -> tuple[array[int], array[int]]:
        """Where the keys and the values of each layer begin."""
        return (
            array("Q", map(Tensor.data_ptr, self.keys)),
            array("Q", map(Tensor.data_ptr, self.values)),
        )


class LayerCall(NamedTuple):
    """Some nodes, and the caches that they are written to; float32 on the CPU.

    Attributes:
        rows: ``[B, N, H]``.
        cos: ``[B or 1, N, D]``.
        sin: ``[B or 1, N, D]``.
        caches: of the layers, of B rows.
        starts: B slots, of each row's first node; the others stand behind it.
        mask: ``[B or 1, 1, N, visible or more]``, added to the scores; None where every node sees
            all slots.
        visible: slots that are looked at.
    """

    rows: Tensor
    cos: Tensor
    sin: Tensor
    caches: LayerCaches
    starts: Sequence[int]
    mask: Tensor | None
    visible: int


class DecoderCall(NamedTuple):
    """Some nodes of a batch of trees, N of each row: the last ones of the M that it has by now.

    Attributes:
        tokens: ``[B, N]`` int64.
        positions: ``[B, M]`` int64 of all nodes.
        ancestors: ``[B, N, M]`` bool, whether a node sees another; every node sees what stands
            before the tree. None where every node sees all slots.
        window: nodes see positions less than this behind theirs; None for any.
        cos: ``[P, D]`` by position, or ``[B or 1, N, D]`` of the nodes; float32.
        sin: as `cos`.
        caches: of the layers, of B rows.
        starts: B slots, of each row's first node of the N; the others stand behind it.
        visible: slots that are looked at.
        keep: ``[K]`` int64, which of the N results are wanted; None for all.
        top_k: how many of the largest logits of each are looked for, up to `Decoder.most_selected`.
    """

    tokens: Tensor
    positions: Tensor
    ancestors: Tensor | None
    window: int | None
    cos: Tensor
    sin: Tensor
    caches: LayerCaches
    starts: Sequence[int]
    visible: int
    keep: Tensor | None = None
    top_k: int = 0
