"""Broken pieces that several tests put in the place of sound ones."""

from __future__ import annotations

import torch

from specdec.trees.build import TreeBuilder
from specdec.trees.tree import DraftTree
from specdec.types import LawRows


def stated_as_it_is(self: TreeBuilder) -> DraftTree:
    """`TreeBuilder.build` without normalising the laws that nodes were drawn from."""
    kept = [rows.log_probs[index] for rows, indices in self._laws for index in indices]
    return DraftTree.from_lists(
        self.tokens,
        self.parents,
        self._draws,
        self._q_row,
        LawRows(torch.stack(kept)) if kept else None,
        self._chances,
        self.handles,
    )
