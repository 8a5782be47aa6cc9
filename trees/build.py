"""A builder for trees whose nodes are decided one after another."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
        self._draws = [Draw.POINT]
        self._q_row = [-1]
        self._chances = [math.nan]
        self._log_probs: list[Tensor] = []
        self._ids: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def add_law(self, rows: LawRows, index: int) -> int:
        """Keeps row `index` as a law that nodes were drawn from, normalised; returns its number."""
        self._log_probs.append(rows.log_probs[index])
        if rows.ids is not None:
            self._ids.append(rows.ids[index])
        return len(self._log_probs) - 1

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
        self._draws.append(draw)
        self._q_row.append(q_row)
        self._chances.append(chance)
        return len(self.tokens) - 1

    def build(self) -> DraftTree:
        """Returns the checked tree."""
        q = None
        if self._log_probs:
            # sparse rows may name more tokens at one level than at another
            ids = pad_sequence(self._ids, True, -1.0) if self._ids else None
            log_probs = pad_sequence(self._log_probs, True, -torch.inf)
            q = LawRows(torch.log_softmax(log_probs, dim=-1), ids)
        return DraftTree.from_lists(
            self.tokens, self.parents, self._draws, self._q_row, q, self._chances, self.handles
        )
