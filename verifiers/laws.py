"""Target and draft law at one node while its children are tested, in sibling order."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.trees.tree import DraftTree
from specdec.types import Draw, ProbRow

# a sum kept up to date by differences is taken anew below this share of what it was
_TRUSTED = 1e-6


class ResidualLaw:
    """The target's law p at a node, and the law q_i of each child, as children are rejected.

    A draw without replacement has its parent's q with all earlier siblings zeroed and the rest
    normalised again; a draw with replacement has q as it was given; a point mass has no row.
    Rejecting a child takes its law out of p. A sparse law or a point mass changes p at the tokens
    it names only, so p is kept without being normalised, beside its sum.

    Args:
        tree: the tree.
        probs: ``[V]`` probabilities of the target at the node; left as they are.
    """

    def __init__(self, tree: DraftTree, probs: Tensor) -> None:
        self._tree = tree
        self._probs = probs
        self._own = False
        self._total = float(probs.sum(dtype=torch.float64))
        self._given: dict[int, ProbRow] = {}
        self._rejected: list[int] = []

    @property
    def weights(self) -> Tensor:
        """``[V]`` what is left of the target's law, up to a factor."""
        return self._probs

    def p(self, child: int) -> float:
        """Returns the probability of the child's token under what is left of p."""
        return float(self._probs[self._tree.token_list[child]]) / self._total

    def q(self, child: int) -> float:
        """Returns q_i of the child's own token; 0 where it underflowed, which decides nothing."""
        law, token = self._law(child), self._tree.token_list[child]
        return float(law.probs[token] if law.ids is None else law.probs[law.ids == token].sum())

    def reject(self, child: int, weight: float = 1.0) -> float:
        """Makes p the residual norm((weight p - q_i)+).

        Where nothing is left, p stays as it is: with weight 1 that can only be rounding, p and q_i
        being equal then.

        Returns:
            The sum of (weight p - q_i)+.
        """
        left = 0.0
        if weight > 0.0:
            scale = self._total / weight
            left = self._subtract(self._law(child), scale) / scale
        self._rejected.append(self._tree.token_list[child])
        return left

    def _subtract(self, law: ProbRow, scale: float) -> float:
        """Takes `scale` times a law out of the weights; returns their sum, 0 for no change."""
        if law.ids is None:
            rest = (self._probs - scale * law.probs.to(self._probs)).clamp_(min=0.0)
            total = float(rest.sum(dtype=torch.float64))
        else:
            known = law.ids >= 0
            ids = law.ids[known].to(self._probs.device)
            old = self._probs[ids]
            new = (old - scale * law.probs[known].to(old)).clamp_(min=0.0)
            rest = self._probs if self._own else self._probs.clone()
            rest[ids] = new
            total = self._total - float((old.double() - new.double()).sum())
            if total < _TRUSTED * self._total:
                total = float(rest.sum(dtype=torch.float64))
            if total <= 0.0:
                rest[ids] = old
        if total <= 0.0:
            return 0.0
        self._probs, self._own, self._total = rest, True, total
        return total

    def _law(self, child: int) -> ProbRow:
        draw, row = self._tree.draw_list[child], self._tree.q_row_list[child]
        if draw == Draw.POINT:
            token = torch.tensor([self._tree.token_list[child]])
            return ProbRow(torch.ones(1), token)
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
