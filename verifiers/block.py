"""Block verification: one decision about how much of a chain to keep."""

from __future__ import annotations

import torch

from specdec.errors import ConfigError
from specdec.random import RandomSource
from specdec.trees.tree import DraftTree
from specdec.types import Draw, TargetLaw, Verdict
from specdec.verifiers.laws import ResidualLaw


class Block:
    """Keeps the longest prefix of a chain whose own coin allows it.

    With w_i the capped joint ratio of the first i tokens, prefix i stands with probability
    S_i / (S_i + 1 - w_i), where S_i = sum (w_i p - q)+ at its end (w_g at the last). All coins are
    thrown and the LONGEST prefix that stands is kept; stopping at the first failure would be wrong.
    Never accepts less than token by token, and no lossless rule for chains accepts more.

    It looks at every row of the chain, so a logits processor that keeps state must not be used.

    Source: Sun et al., "Block Verification" (arXiv 2403.10444), algorithm 2.
    """

    name = "block"
    accepts = frozenset({Draw.POINT, Draw.IID, Draw.WOR})
    walks_down = False

    def verify(self, tree: DraftTree, target: TargetLaw, random: RandomSource) -> Verdict:
        """Returns the accepted path and the token after it; O(N V).

        Raises:
            ConfigError: if the tree branches.
        """
        if any(len(children) > 1 for children in tree.children):
            raise ConfigError(
                "verifier 'block' is for chains; use policy='chain', or verifier='traversal', "
                "which is the same rule on trees"
            )
        kept, emit = 0, torch.empty(0)  # the root stands always
        weight = 1.0
        for node in range(len(tree)):
            law = ResidualLaw(tree, target.row(node))
            stands, next_weight = weight, 0.0
            if node < len(tree) - 1:
                p, q = law.p(node + 1), law.q(node + 1)
                next_weight = min(1.0, weight * p / q) if q > 0.0 else 0.0
                left = law.reject(node + 1, weight)
                stands = left / (left + 1.0 - weight) if left > 0.0 else 0.0
            if node == 0 or random.bernoulli(stands):
                kept, emit = node, law.weights
            weight = next_weight
        return Verdict(list(range(1, kept + 1)), random.categorical(emit))
