"""Recursive rejection sampling over a tree, for all three draw laws."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.random import RandomSource
from specdec.trees.tree import DraftTree
from specdec.types import Draw, TargetLaw, Verdict
from specdec.verifiers.laws import ResidualLaw


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
            law = ResidualLaw(tree, target.row(node))
            child = _accepted(tree.children[node], law, random)
            if child is None:
                return Verdict(path, random.categorical(law.weights))
            path.append(child)
            node = child


def _accepted(children: Sequence[int], law: ResidualLaw, random: RandomSource) -> int | None:
    """Returns the accepted child; None if all were rejected, their laws taken out of `law`."""
    for child in children:
        p, q = law.p(child), law.q(child)
        if q > 0.0 and random.bernoulli(p / q):
            return child
        law.reject(child)
    return None
