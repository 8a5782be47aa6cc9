"""Who sees whom inside a tree: as a boolean matrix, and as words of bits for the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_WORD_BITS = 32


def ancestor_matrix(parents: Sequence[int], size: int) -> Tensor:
    """Returns ``[size, size]`` bool: entry (i, j) says that node i sees node j.

    A node sees itself and its ancestors. Rows past the tree see only themselves, so that no row
    of a padded batch is empty (a softmax over nothing is NaN).

    Args:
        parents: parent of each node, -1 for the root, parents before children.
        size: number of rows wanted, at least ``len(parents)``.
    """
    return ancestor_matrices([parents], size)[0]


def ancestor_matrices(trees: Sequence[Sequence[int]], size: int) -> Tensor:
    """Returns ``[B, size, size]`` bool, `ancestor_matrix` of the parents of each tree."""
    matrices = np.zeros((len(trees), size, size), dtype=np.bool_)
    for matrix, parents in zip(matrices, trees, strict=True):
        matrix.reshape(-1)[:: size + 1] = True
        for node, parent in enumerate(parents):
            if parent >= 0:
                matrix[node] |= matrix[parent]
    return torch.from_numpy(matrices)


def num_words(num_nodes: int) -> int:
    """Returns the 32-bit words that hold one bit for each of `num_nodes` nodes."""
    return (num_nodes + _WORD_BITS - 1) // _WORD_BITS


def pack_ancestors(matrix: Tensor) -> Tensor:
    """Returns the bits of an ancestor matrix as words.

    Words of 32 bits, not 64: 128 nodes need more than one anyway, and torch has little arithmetic
    on uint32. Bit 31 is the sign of an int32, which does no harm to a shift and a mask.

    Args:
        matrix: ``[..., N, M]`` bool, entry (i, j): node i sees node j.

    Returns:
        ``[..., N, W]`` int32, ``W = ceil(M / 32)``; bit ``j % 32`` of word ``j // 32`` is column j.
    """
    columns = matrix.shape[-1]
    words = num_words(columns)
    padded = torch.nn.functional.pad(matrix.to(torch.int64), (0, words * _WORD_BITS - columns))
    shifts = torch.arange(_WORD_BITS, device=matrix.device)
    packed = (padded.reshape(*padded.shape[:-1], words, _WORD_BITS) << shifts).sum(-1)
    # a word from 2**31 up is the negative number with the same bits
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_ancestors(words: Tensor, columns: int) -> Tensor:
    """Returns the ``[..., N, columns]`` bool matrix that ``[..., N, W]`` int32 words stand for."""
    shifts = torch.arange(_WORD_BITS, dtype=torch.int32, device=words.device)
    bits = (words.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :columns].bool()


def visible_slots(
    ancestors: Tensor,
    context_lengths: Tensor,
    num_nodes: Tensor,
    num_slots: int,
    sliding_window: int | None = None,
) -> Tensor:
    """Returns ``[B, N, num_slots]`` bool: which slots of the cache each node sees.

    Nothing is read on the host. Rows past ``num_nodes[b]`` see nothing.

    Args:
        ancestors: ``[B, N, W]`` int32 of `pack_ancestors`.
        context_lengths: ``[B]`` int32 slots before the tree.
        num_nodes: ``[B]`` int32 nodes of the tree.
        num_slots: slots wanted.
        sliding_window: a node sees positions greater than its own minus this; None for all. A
            node's position is the context length plus its number of ancestors.
    """
    nodes = ancestors.shape[1]
    bits = unpack_ancestors(ancestors, nodes)
    slots = torch.arange(num_slots, device=ancestors.device)
    place = slots - context_lengths.unsqueeze(1)  # [B, S] place in the tree, negative before it
    inside = place.clamp(0, nodes - 1)
    in_tree = bits.gather(2, inside.unsqueeze(1).expand(-1, nodes, -1))
    in_tree = in_tree & ((place >= 0) & (place < num_nodes.unsqueeze(1))).unsqueeze(1)
    visible = (place < 0).unsqueeze(1) | in_tree
    if sliding_window is not None:
        depths = bits.sum(-1) - 1
        behind = torch.where(place < 0, place, depths.gather(1, inside))
        visible &= depths.unsqueeze(2) - behind.unsqueeze(1) < sliding_window
    live = torch.arange(nodes, device=ancestors.device) < num_nodes.unsqueeze(1)
    return visible & live.unsqueeze(2)
