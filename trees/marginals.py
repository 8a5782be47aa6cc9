"""A tree from one law a depth: a chain's draft calls, a tree's width."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.random import RandomSource
from specdec.trees.base import BasePolicy
from specdec.trees.best_first import Candidates, grow_best_first, most_probable
from specdec.trees.tree import DraftTree
from specdec.types import Budget, DraftLaw, Draw, GrowPlan, LawRows, Root


class Marginals(BasePolicy):
    """The nodes of the largest products of per-depth probabilities.

    The law is asked along its own most probable chain only, one row a level, and each level's row
    serves every node of that depth. For a drafter that answers from the marginal of a depth (a
    diffusion block) nothing is lost; for a language model it trades the accuracy of side branches
    for draft passes of one row. Nodes are point masses.

    Source: DDTree's heap over per-depth lists (arXiv 2604.12989), here grown level by level.

    Args:
        max_branching: the most children a node may get.
        max_depth: the deepest level.
    """

    name = "marginals"
    draws = frozenset({Draw.POINT})

    def __init__(self, max_branching: int = 16, max_depth: int = 16) -> None:
        self._max_branching = max_branching
        self._max_depth = max_depth

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""

        def weigh(rows: LawRows, handles: Sequence[int], _depth: int) -> Candidates:
            ids, values = most_probable(rows, min(self._max_branching, budget.nodes))
            return ids.repeat(len(handles), axis=0), values.repeat(len(handles), axis=0)

        plan = grow_best_first(law, root, budget, weigh, max_depth=self._max_depth)
        try:
            level = next(plan)
            while True:
                # the first node of a level is the most probable: it was created first
                level = plan.send((yield level[:1]))
        except StopIteration as grown:
            tree: DraftTree = grown.value
            return tree
