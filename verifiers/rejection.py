"""Recursive rejection sampling over a tree, for all three draw laws."""

from __future__ import annotations

from torch import Tensor

from specdec.random import RandomSource
from specdec.trees.tree import DraftTree
from specdec.types import Draw, TargetLaw, Verdict
from specdec.verifiers.laws import SiblingLaws


class Rejection:
    """Tests children in order: accept with min(1, p/q), else p becomes the residual norm((p-q)+).

    q is the law the child was really drawn from, rebuilt in sibling order. With one child this is
    Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318); with draws from one q,
    SpecInfer's multi-round rule (arXiv 2305.09781, duplicates kept and tested); without
    replacement, RSD (arXiv 2402.14160), Sequoia (arXiv 2402.12374) and DySpec (arXiv 2410.11744);
    with point masses, a child's token is zeroed in p when it is rejected.
    """

    name = "rejection"
    accepts = frozenset({Draw.POINT, Draw.IID, Draw.WOR})
    walks_down = True

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        """Returns the accepted path and the token after it; O(V) for each tested child."""
        node = 0
        path: list[int] = []
        while True:
            child, residual = _test_children(tree, node, target.row(node), random)
            if child is None:
                return Verdict(path, random.categorical(residual))
            path.append(child)
            node = child


def _test_children(
    tree: DraftTree, node: int, target_probs: Tensor, random: RandomSource
) -> tuple[int | None, Tensor]:
    """Returns the accepted child, or None and the ``[V]`` law to draw the next token from."""
    siblings = SiblingLaws(tree)
    for child in tree.children[node]:
        p, q = float(target_probs[tree.token_list[child]]), siblings.probability(child)
        if q > 0.0 and random.bernoulli(p / q):
            return child, target_probs
        rest = siblings.subtract(child, target_probs)
        total = rest.sum()
        # nothing left can only be rounding: then p and q were equal
        target_probs = rest / total if total > 0 else target_probs
        siblings.reject(child)
    return None, target_probs
