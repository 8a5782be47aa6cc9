"""What a pass of a model gives: logits, and the largest of them where they were looked for."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor


class Selected:
    """The k largest logits of every node, room for them at first.

    They stand in plain arrays, of which the tensors are views: a number of an array is read in a
    tenth of the time that a tensor's takes.

    Args:
        batch: B rows.
        count: N nodes of each.
        k: the logits of a node.

    Attributes:
        ids: ``[B, N, k]`` int64.
        logits: ``[B, N, k]`` float32, largest first, of equal ones the lowest id first; NaN counts
            as the largest.
        rows: B pairs of both's parts ``[N, k]``.
    """

    def __init__(self, batch: int, count: int, k: int) -> None:
        size, shape = batch * count * k, (batch, count, k)
        self._ids, self._logits = array("q", bytes(8 * size)), array("f", bytes(4 * size))
        self.ids = torch.frombuffer(self._ids, dtype=torch.int64).view(shape)
        self.logits = torch.frombuffer(self._logits, dtype=torch.float32).view(shape)
        self.rows = list(zip(self.ids.unbind(), self.logits.unbind(), strict=True))

    def choices(self, row: int, count: int) -> list[tuple[int, float]]:
        """Returns the first id and logit of each of the first `count` nodes of a row."""
        _, nodes, k = self.ids.shape
        own = slice(row * nodes * k, (row * nodes + count) * k, k)
        return list(zip(self._ids[own], self._logits[own], strict=True))


class Decoded:
    """What a pass gives.

    Views are made with it and not when they are wanted: behind a pass, which leaves nothing else in
    the caches, torch's first call takes some thirty microseconds, and others ten.

    Args:
        logits: ``[B, N, V]``, or without a head ``[B, N, H]``, what would go into it.
        top: the largest of them, if they were looked for.

    Attributes:
        logits: as given.
        rows: its B parts ``[N, V]``.
        top: as given.
    """

    def __init__(self, logits: Tensor, top: Selected | None = None) -> None:
        self.logits = logits
        self.rows = logits.unbind()
        self.top = top
