"""Who sees whom inside a tree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def ancestor_matrix(parents: Sequence[int], size: int) -> Tensor:
    """Returns ``[size, size]`` bool: entry (i, j) says that node i sees node j.

    A node sees itself and its ancestors. Rows past the tree see only themselves, so that no row
    of a padded batch is empty (a softmax over nothing is NaN).

    Args:
        parents: parent of each node, -1 for the root, parents before children.
        size: number of rows wanted, at least ``len(parents)``.
    """
    matrix = np.eye(size, dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            matrix[node] |= matrix[parent]
    return torch.from_numpy(matrix)
