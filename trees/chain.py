"""The plain chain: one guess a level, as in Leviathan et al. (arXiv 2211.17192)."""

from __future__ import annotations

from specdec.random import RandomSource
from specdec.trees.base import BasePolicy
from specdec.trees.build import TreeBuilder
from specdec.trees.draws import choose_tokens
from specdec.types import Budget, DraftLaw, Draw, GrowPlan, Root


class Chain(BasePolicy):
    """One node a level until the budget, the depth or the drafter's knowledge ends.

    Args:
        draw: how each token is chosen. POINT takes the most probable one.
        max_depth: the longest chain, whatever the budget (`num_speculative_tokens` elsewhere).
    """

    name = "chain"

    def __init__(self, draw: Draw = Draw.POINT, max_depth: int | None = None) -> None:
        self.draws = frozenset({draw})
        self._draw = draw
        self._max_depth = max_depth

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        builder = TreeBuilder(root.token)
        length = min(budget.nodes, budget.depth)
        if self._max_depth is not None:
            length = min(length, self._max_depth)
        node = 0
        for depth in range(1, length + 1):
            rows = yield [builder.handles[node]]
            (chosen,) = choose_tokens(rows, [1], self._draw, random, root, depth)
            if not chosen:
                break
            token, chance = chosen[0]
            drawn = self._draw in (Draw.IID, Draw.WOR)
            q_row = builder.add_law(rows, 0) if drawn else -1
            handle = law.extend(builder.handles[node], token)
            node = builder.add(node, token, handle, self._draw, q_row, chance)
        return builder.build()
