"""Broken pieces that several tests put in the place of sound ones."""

from __future__ import annotations

import torch

from specdec.trees.build import TreeBuilder
from specdec.trees.tree import DraftTree
from specdec.types import LawRows


def stated_as_it_is(self: TreeBuilder) -> DraftTree:
    """`TreeBuilder.build` without normalising the laws that nodes were drawn from."""
    return DraftTree.from_lists(
        self.tokens,
        self.parents,
        self._draws,
        self._q_row,
        LawRows(torch.stack(self._log_probs)) if self._log_probs else None,
        self._chances,
        self.handles,
    )
