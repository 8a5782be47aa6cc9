"""The draft laws of siblings, rebuilt in the order in which they are tested."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.trees.tree import DraftTree
from specdec.types import Draw, ProbRow


class SiblingLaws:
    """The law q_i of each child of one node, given the siblings tested before it.

    A draw without replacement sees its parent's q with all earlier siblings zeroed and the rest
    normalised again; a draw with replacement sees q as it was given; a point mass has no row.

    Args:
        tree: the tree.
    """

    def __init__(self, tree: DraftTree) -> None:
        self._tree = tree
        self._given: dict[int, ProbRow] = {}
        self._rejected: list[int] = []

    def probability(self, child: int) -> float:
        """Returns q_i of the child's own token; 0 where it underflowed, which decides nothing."""
        q, token = self._law(child), self._tree.token_list[child]
        if q is None:
            return 1.0
        return float(q.probs[token] if q.ids is None else q.probs[q.ids == token].sum())

    def subtract(self, child: int, target_probs: Tensor) -> Tensor:
        """Returns ``[V]`` (target_probs - q_i)+, not normalised."""
        q = self._law(child)
        rest = target_probs.clone()
        if q is None:
            rest[self._tree.token_list[child]] = 0.0
        elif q.ids is None:
            rest -= q.probs.to(rest)
        else:
            known = q.ids >= 0
            rest.index_add_(0, q.ids[known].to(rest.device), -q.probs[known].to(rest))
        return rest.clamp_(min=0.0)

    def reject(self, child: int) -> None:
        """Tells that a child was tested and rejected."""
        self._rejected.append(self._tree.token_list[child])

    def _law(self, child: int) -> ProbRow | None:
        draw, row = self._tree.draw_list[child], self._tree.q_row_list[child]
        if draw == Draw.POINT:
            return None
        if row not in self._given:
            self._given[row] = self._tree.draft_probs(row)
        q = self._given[row]
        if draw == Draw.IID or not self._rejected:
            return q
        return _zeroed(q, self._rejected)


def _zeroed(q: ProbRow, tokens: list[int]) -> ProbRow:
    """Returns q with `tokens` zeroed and the rest normalised again."""
    probs = q.probs.clone()
    for token in tokens:
        probs[token if q.ids is None else q.ids == token] = 0.0
    total = probs.sum()
    return ProbRow(probs / total if total > 0 else torch.zeros_like(probs), q.ids)
