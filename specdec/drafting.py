"""The drafting half of a step: a tree for every row, as large as its budget and its text allow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from specdec.backend.cache import TreeCache
from specdec.backend.support import PositionLimit
from specdec.build import names_of
from specdec.errors import ConfigError
from specdec.row_text import Row
from specdec.sampling import warp_logits
from specdec.trees.grow import grow_trees
from specdec.trees.tree import DraftTree
from specdec.types import Budget, DraftContext, DraftLaw, GrowPlan, Root, TargetCache

if TYPE_CHECKING:
    from specdec.loop import Parts


class Drafting:
    """Grows the trees of a call's steps.

    Args:
        parts: of the loop; without a drafter every tree is a root.
        cache: the target's, for drafters made of its layers.
        greedy: whether the target takes its argmax.
        vocab_size: of the model.
        positions: where the text must end; None where positions are open-ended.
    """

    def __init__(
        self,
        parts: Parts,
        cache: TreeCache,
        *,
        greedy: bool,
        vocab_size: int,
        positions: PositionLimit | None,
    ) -> None:
        self._parts = parts
        # plain numbers, as trees have them
        self._accepts = frozenset(map(int, parts.verifier.accepts))
        self._cache = cache
        self._greedy = greedy
        self._vocab_size = vocab_size
        self._positions = positions

    def trees(self, rows: Sequence[Row], context: float) -> list[DraftTree]:
        """Returns a tree for each row, the root alone where nothing is drafted.

        Args:
            rows: the active ones, in the order of the cache.
            context: mean tokens of the prefixes.

        Raises:
            ConfigError: if the drafter guesses tokens the model does not have, or the policy draws
                nodes that the verifier is not exact for.
        """
        drafter = self._parts.drafter
        plans: dict[int, tuple[DraftLaw, GrowPlan]] = {}
        grown: dict[int, DraftTree] = {}
        if drafter is not None:
            allotted = self._parts.budget.allot([row.index for row in rows], context)
            for place, (row, own) in enumerate(zip(rows, allotted, strict=True)):
                budget = self._within_text(row, own) if own.nodes else own
                if budget.nodes and budget.depth:
                    plans[place] = self._plan(place, row, budget)
        if drafter is not None and plans:
            trees = grow_trees(list(plans.values()), drafter.expand)
            grown = dict(zip(plans, map(self._checked, trees), strict=True))
        return [
            grown[place] if place in grown else DraftTree.root_only(row.tokens[-1])
            for place, row in enumerate(rows)
        ]

    def _plan(self, place: int, row: Row, budget: Budget) -> tuple[DraftLaw, GrowPlan]:
        """Returns a row's law and how its tree grows from it."""
        assert self._parts.drafter is not None
        warp = None if self._greedy else partial(warp_logits, row.processors)
        shared = TargetCache(self._cache, place)
        law = self._parts.drafter.law(
            DraftContext(row.index, row.tokens, budget.depth + 1, warp, shared)
        )
        root = Root(row.tokens[-1], row.root_position, self._greedy)
        return law, self._parts.policy.grow(law, root, budget, row.streams.draft)

    def _within_text(self, row: Row, budget: Budget) -> Budget:
        """Returns the budget, no deeper than the row's text may still become."""
        depth = min(budget.nodes, budget.depth)
        remaining = row.stopper.remaining(row.prefix.length)
        if remaining is not None:
            depth = min(depth, remaining - 1)
        if self._positions is not None:
            depth = min(depth, self._positions.num_positions - 1 - row.root_position)
        return budget._replace(depth=max(depth, 0))

    def _checked(self, tree: DraftTree) -> DraftTree:
        drafter, policy, verifier = self._parts.drafter, self._parts.policy, self._parts.verifier
        assert drafter is not None
        if max(tree.token_list) >= self._vocab_size:
            raise ConfigError(
                f"drafter {drafter.name!r} guessed token {max(tree.token_list)}, but the "
                f"model's vocabulary has {self._vocab_size}; their tokenizers do not fit"
            )
        if not self._accepts.issuperset(tree.draw_list[1:]):
            raise ConfigError(
                f"policy {policy.name!r} made a tree with nodes drawn as "
                f"{names_of(tree.kinds)}; verifier {verifier.name!r} is exact for "
                f"{names_of(verifier.accepts)} only"
            )
        return tree
