"""A builder for trees whose nodes are decided one after another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specdec.trees.tree import DraftTree
from specdec.types import Draw, LawRows


class TreeBuilder:
    """Collects nodes and the draft laws they were drawn from, then makes a `DraftTree`.

    Each node carries the handle the draft law issued for it, so that a policy can ask for its row.
    """

    def __init__(self, root_token: int) -> None:
        self.tokens = [root_token]
        self.parents = [-1]
        self.handles = [0]
        self._draws = [int(Draw.POINT)]  # enum's members would be slow to turn into a tensor
        self._q_row = [-1]
        self._chances = [math.nan]
        self._laws: list[tuple[LawRows, list[int]]] = []  # rows of one level, and which are kept
        self._num_laws = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def add_law(self, rows: LawRows, index: int) -> int:
        """Keeps row `index` as a law that nodes were drawn from, normalised; returns its number."""
        if not self._laws or self._laws[-1][0] is not rows:
            self._laws.append((rows, []))
        self._laws[-1][1].append(index)
        self._num_laws += 1
        return self._num_laws - 1

    def add(
        self,
        parent: int,
        token: int,
        handle: int,
        draw: Draw = Draw.POINT,
        q_row: int = -1,
        chance: float = math.nan,
    ) -> int:
        """Adds a node below `parent`; returns its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.handles.append(handle)
        self._draws.append(int(draw))
        self._q_row.append(q_row)
        self._chances.append(chance)
        return len(self.tokens) - 1

    def build(self) -> DraftTree:
        """Returns the checked tree."""
        return DraftTree.from_lists(
            self.tokens,
            self.parents,
            self._draws,
            self._q_row,
            self._kept_laws() if self._laws else None,
            self._chances,
            self.handles,
        )

    def _kept_laws(self) -> LawRows:
        index: list[int] = []
        begin = 0
        for rows, kept in self._laws:
            index += [begin + place for place in kept]
            begin += len(rows.log_probs)
        place = torch.tensor(index, device=self._laws[0][0].log_probs.device)
        log_probs = _stacked([rows.log_probs for rows, _ in self._laws], -torch.inf)
        ids = [rows.ids for rows, _ in self._laws if rows.ids is not None]
        return LawRows(
            torch.log_softmax(log_probs.index_select(0, place), dim=-1),
            _stacked(ids, -1).index_select(0, place) if ids else None,
        )


def _stacked(tables: list[Tensor], filler: float) -> Tensor:
    """Returns tables ``[n, k]`` below each other; some levels name fewer tokens than others."""
    width = max(table.shape[1] for table in tables)
    return torch.cat(
        [
            torch.nn.functional.pad(table, (0, width - table.shape[1]), value=filler)
            if table.shape[1] < width
            else table
            for table in tables
        ]
    )
