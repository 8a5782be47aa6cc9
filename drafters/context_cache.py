"""Keys and values that a draft network keeps of each row's committed tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_FIRST_ROOM = 256

# keys and values [L, 2, n, Hkv, head_dim] of features [n, F] at positions [n]
Project = Callable[[Tensor, Tensor], Tensor]


class ContextCache:
    """Rows come, grow with each step and go; nothing is ever taken back.

    Features are noted when they are seen, and projected when a row is read: many rows in one
    product, and none for rows that draft nothing.
    """

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}

    def start(self, row: int, first: int, features: Tensor | None) -> None:
        """Begins a row.

        Args:
            row: its number.
            first: position of the first feature, or of the first that will come.
            features: ``[n, F]``, None if none are known.
        """
        self._rows[row] = _Row(first)
        if features is not None:
            self.note(row, features)

    def note(self, row: int, features: Tensor) -> None:
        """Adds ``[n, F]`` features of the tokens that follow; the tensor is kept as it is."""
        if len(features):
            self._rows[row].waiting.append(features)
            self._rows[row].last = features[-1]

    def last(self, rows: Sequence[int]) -> list[Tensor | None]:
        """Returns the newest feature ``[F]`` of each row, None of a row that has none."""
        return [self._rows[row].last for row in rows]

    def stop(self, row: int) -> None:
        """Forgets a row."""
        self._rows.pop(row, None)

    def clear(self) -> None:
        """Forgets all rows."""
        self._rows.clear()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: Sequence[int], project: Project) -> tuple[Tensor, Tensor]:
        """Returns what the rows hold, padded to the longest.

        Args:
            rows: their numbers, each once.
            project: of what has been noted since.

        Returns:
            ``[L, 2, R, T, Hkv, head_dim]``, and ``[R, T]`` bool: which of it is a row's own.
        """
        held = [self._rows[row] for row in rows]
        _project(held, project)
        lengths = [row.length for row in held]
        width = max(lengths)
        if len(held) == 1:
            kept = held[0].kept[:, :, :width].unsqueeze(2)
        else:
            layers, two, _, heads, size = held[0].kept.shape
            kept = held[0].kept.new_zeros(layers, two, len(held), width, heads, size)
            for index, row in enumerate(held):
                kept[:, :, index, : row.length] = row.kept[:, :, : row.length]
        own = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
        return kept, own.to(kept.device)


class _Row:
    """One row: what was projected, with room behind it, and what waits."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.length = 0
        self.waiting: list[Tensor] = []
        self.last: Tensor | None = None
        self.kept = torch.empty(0)

    def append(self, new: Tensor) -> None:
        """Adds ``[L, 2, n, Hkv, head_dim]``."""
        end = self.length + new.shape[2]
        if self.kept.ndim == 1 or end > self.kept.shape[2]:
            room = max(2 * end, _FIRST_ROOM)
            grown = new.new_empty(*new.shape[:2], room, *new.shape[3:])
            if self.length:
                grown[:, :, : self.length] = self.kept[:, :, : self.length]
            self.kept = grown
        self.kept[:, :, self.length : end] = new
        self.length = end


def _project(rows: Sequence[_Row], project: Project) -> None:
    """Projects what waits in some rows, in one go."""
    counts = [sum(map(len, row.waiting)) for row in rows]
    positions = [
        torch.arange(row.first + row.length, row.first + row.length + count)
        for row, count in zip(rows, counts, strict=True)
    ]
    waiting = [part for row in rows for part in row.waiting]
    if not waiting:
        return
    features = torch.cat(waiting)
    new = project(features, torch.cat(positions).to(features.device))
    for row, part in zip(rows, torch.split(new, counts, dim=2), strict=True):
        row.waiting = []
        row.append(part)
