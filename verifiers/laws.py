"""Target and draft law at one node while its children are tested, in sibling order."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.trees.tree import DraftTree
from specdec.types import Draw

# a sum kept up to date by differences is taken anew below this share of what it was
_TRUSTED = 1e-6
_Named = dict[int, float]  # the law of a few tokens: a point mass, or a sparse row


class ResidualLaw:
    """The target's law p at a node, and the law q_i of each child, as children are rejected.

    A draw without replacement has its parent's q with all earlier siblings zeroed and the rest
    normalised again; a draw with replacement has q as it was given; a point mass is its token.
    Rejecting a child takes its law out of p. A law that names a few tokens changes p at these only:
    p is kept without being normalised, beside its sum, and such tokens are kept as plain numbers.

    Args:
        tree: the tree.
        probs: ``[V]`` probabilities of the target at the node; left as they are.
    """

    def __init__(self, tree: DraftTree, probs: Tensor) -> None:
        self._tree = tree
        self._probs = probs
        self._changed: _Named = {}  # weights that differ from `_probs`
        self._total: float | None = None  # of the weights, taken when it is first wanted
        self._given: dict[int, Tensor | _Named] = {}
        self._rejected: list[int] = []

    @property
    def weights(self) -> Tensor:
        """``[V]`` what is left of the target's law, up to a factor."""
        if self._changed:
            self._probs = self._probs.clone()
            tokens = torch.tensor(list(self._changed), device=self._probs.device)
            self._probs[tokens] = self._probs.new_tensor(list(self._changed.values()))
            self._changed = {}
        return self._probs

    def p(self, child: int) -> float:
        """Returns the probability of the child's token under what is left of p."""
        weight = self._weight(self._tree.token_list[child])
        return weight if self._total is None else weight / self._total

    def q(self, child: int) -> float:
        """Returns q_i of the child's own token; 0 where it underflowed, which decides nothing."""
        law, token = self._law(child), self._tree.token_list[child]
        return law.get(token, 0.0) if isinstance(law, dict) else float(law[token])

    def reject(self, child: int, weight: float = 1.0) -> float:
        """Makes p the residual norm((weight p - q_i)+).

        Where nothing is left, p stays as it is: with weight 1 that can only be rounding, p and q_i
        being equal then.

        Returns:
            The sum of (weight p - q_i)+.
        """
        left = 0.0
        if weight > 0.0:
            if self._total is None:
                self._total = float(self._probs.sum(dtype=torch.float64))
            scale = self._total / weight
            law = self._law(child)
            take = self._take_named if isinstance(law, dict) else self._take_dense
            left = take(law, scale) / scale  # type: ignore[arg-type]
        self._rejected.append(self._tree.token_list[child])
        return left

    def _weight(self, token: int) -> float:
        changed = self._changed.get(token)
        return float(self._probs[token]) if changed is None else changed

    def _take_named(self, law: _Named, scale: float) -> float:
        """Takes `scale` times a law out of the weights; returns their sum, 0 for no change."""
        assert self._total is not None
        old = {token: self._weight(token) for token in law}
        new = {token: max(old[token] - scale * q, 0.0) for token, q in law.items()}
        before = self._changed
        self._changed = before | new
        total = self._total - sum(old[token] - new[token] for token in law)
        if total < _TRUSTED * self._total:
            kept = self._probs.to(torch.float64, copy=True)
            kept[list(self._changed)] = kept.new_tensor(list(self._changed.values()))
            total = float(kept.sum())
        if total <= 0.0:
            self._changed = before
            return 0.0
        self._total = total
        return total

    def _take_dense(self, law: Tensor, scale: float) -> float:
        """Does what `_take_named` does, with a law over the whole vocabulary."""
        rest = (self.weights - scale * law.to(self._probs)).clamp_(min=0.0)
        total = float(rest.sum(dtype=torch.float64))
        if total > 0.0:
            self._probs, self._total = rest, total
        return total

    def _law(self, child: int) -> Tensor | _Named:
        draw, row = self._tree.draw_list[child], self._tree.q_row_list[child]
        if draw == Draw.POINT:
            return {self._tree.token_list[child]: 1.0}
        if row not in self._given:
            probs, ids = self._tree.draft_probs(row)
            named = None if ids is None else zip(ids.tolist(), probs.tolist(), strict=True)
            self._given[row] = probs if named is None else {t: q for t, q in named if t >= 0}
        q = self._given[row]
        if draw == Draw.IID or not self._rejected:
            return q
        return _zeroed(q, self._rejected)


def _zeroed(q: Tensor | _Named, tokens: list[int]) -> Tensor | _Named:
    """Returns q with `tokens` zeroed and the rest normalised again."""
    if isinstance(q, dict):
        left = {token: weight for token, weight in q.items() if token not in tokens}
        total = sum(left.values())
        return {token: weight / total for token, weight in left.items()} if total > 0 else {}
    probs = q.clone()
    probs[tokens] = 0.0
    return probs / probs.sum() if probs.any() else probs
