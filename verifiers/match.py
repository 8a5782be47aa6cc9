"""Sample and match: the rule for guesses that are point masses."""

from __future__ import annotations

from specdec.random import RandomSource
from specdec.trees.tree import DraftTree
from specdec.types import Draw, TargetLaw, Verdict
from specdec.verifiers.walk import follow


class Match:
    """Draws the target's token at each node with fresh coins and follows the child that carries it.

    Lossless for every tree fixed before the coins fall: the emitted token is the target's own
    draw. A child set C is entered with probability p(C), which no rule can beat when the guesses
    are point masses. At temperature 0 the draw is the argmax.

    Source: naive sampling verification, e.g. SpecInfer (arXiv 2305.09781), section 4.
    """

    name = "match"
    accepts = frozenset({Draw.POINT})
    walks_down = True

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        """Returns the accepted path and the token after it; O(V) for each node on the path."""
        if target.greedy:
            return follow(tree, target.argmax)
        return follow(tree, lambda node: random.categorical(target.row(node)))
