"""Traversal verification: leaves first, so that a good end can save a doubtful beginning."""

from __future__ import annotations

from specdec.random import RandomSource
from specdec.trees.tree import DraftTree
from specdec.types import Draw, TargetLaw, Verdict
from specdec.verifiers.laws import ResidualLaw


class Traversal:
    """Accepts whole paths, from the leaves up.

    Each node on the current path has a weight, the capped joint ratio of target and draft along
    it. The first leaf in depth-first order is accepted with its weight; if it is rejected it leaves
    the tree, and its parent's law and weight take the residual. Never accepts less than rejection
    on the same tree; on a chain it is block verification; on point masses it is `match`.

    It looks at rows of nodes that may not become text, so it computes up to one row a node, and a
    logits processor that keeps state must not be used with it.

    Source: Traversal Verification (arXiv 2505.12398). The cap on weights guards an ulp above 1.
    """

    name = "traversal"
    accepts = frozenset({Draw.POINT, Draw.IID, Draw.WOR})
    walks_down = False

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        """Returns the accepted path and the token after it; O(N V)."""
        walk = _Walk(tree, target)
        node = walk.descend(0)
        while node != 0:
            if random.bernoulli(walk.weights[node]):
                break
            node = walk.descend(walk.reject(node))
        return Verdict(tree.path_to(node), random.categorical(walk.law(node).weights))


class _Walk:
    """The depth-first walk: weights and laws of the nodes on the current path."""

    def __init__(self, tree: DraftTree, target: TargetLaw) -> None:
        self._tree = tree
        self._target = target
        self._next_child = [0] * len(tree)
        self._laws: dict[int, ResidualLaw] = {}
        self.weights: dict[int, float] = {0: 1.0}

    def law(self, node: int) -> ResidualLaw:
        """Returns the law at a node as it stands."""
        if node not in self._laws:
            self._laws[node] = ResidualLaw(self._tree, self._target.row(node))
        return self._laws[node]

    def descend(self, node: int) -> int:
        """Returns the first leaf below `node` that is left, `node` itself if none."""
        while self._next_child[node] < len(self._tree.children[node]):
            child = self._tree.children[node][self._next_child[node]]
            p, q = self.law(node).p(child), self.law(node).q(child)
            self.weights[child] = min(1.0, self.weights[node] * p / q) if q > 0.0 else 0.0
            node = child
        return node

    def reject(self, node: int) -> int:
        """Takes a rejected leaf out of the tree; returns its parent with its law made residual."""
        parent = self._tree.parent_list[node]
        weight = self.weights[parent]
        left = self.law(parent).reject(node, weight)
        self.weights[parent] = min(1.0, left / (left + 1.0 - weight)) if left > 0.0 else 0.0
        self._next_child[parent] += 1
        return parent
