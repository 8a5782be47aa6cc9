"""Coupled acceptance: the text is a function of the target and a seed, whatever was drafted."""

from __future__ import annotations

from specdec.random import RandomSource
from specdec.trees.tree import DraftTree
from specdec.types import Draw, TargetLaw, Verdict
from specdec.verifiers.walk import follow


class Coupled:
    """Emits argmax(log p + g_t) at every node, g_t being Gumbel noise keyed by (seed, row, t).

    t is the absolute position of the emitted token. argmax(log p + g) follows p exactly, and g_t is
    independent of the g before it, so the text follows the target's law; and since nothing else
    enters, every drafter, tree and batch gives the same text, and so does plain decoding.
    Therefore any tree may be verified, also one chosen with a look at the noise.

    Source: Gumbel-max coupling of draft and target, e.g. Daliri et al. (arXiv 2408.07978); the
    keying by absolute position, which makes the text independent of the tree, is ours.
    """

    name = "coupled"
    accepts = frozenset(Draw)
    walks_down = True

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        """Returns the accepted path and the token after it; O(V) for each node on the path."""
        if target.greedy:
            return follow(tree, target.argmax)
        return follow(
            tree, lambda node: random.gumbel_argmax(target.scores(node), target.position(node))
        )
