"""One drawn child, tested first, beside the most probable ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec.errors import ConfigError
from specdec.random import RandomSource
from specdec.trees.base import BasePolicy
from specdec.trees.build import TreeBuilder
from specdec.trees.static import Guess, grow_template
from specdec.trees.templates import branching_template, default_branching
from specdec.types import Budget, DraftLaw, Draw, GrowPlan, LawRows, Root


class SampledPlusTop(BasePolicy):
    """At every node the k - 1 most probable tokens, and before them one drawn from all others.

    The drawn child follows q restricted to the others; the top tokens are point masses. For one
    node this law's best rule accepts sum_top p + sum_rest min(p, q'), and testing the drawn child
    first attains it; testing it last does not.

    Source: the greedy draft law of Hu et al. (arXiv 2502.18779) at each node of a tree.

    Args:
        branching: k by level; None for `default_branching(node_budget)`.
    """

    name = "sampled_plus_top"
    draws = frozenset({Draw.POINT, Draw.IID})

    def __init__(self, branching: Sequence[int] | None = None) -> None:
        if branching is not None:
            branching_template(branching)  # checks it
        self._branching = None if branching is None else list(branching)

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        branching = self._branching or default_branching(budget.nodes)
        paths = branching_template(branching)
        if len(paths) > budget.nodes:
            raise ConfigError(
                f"branching {branching} makes {len(paths)} nodes, node_budget is {budget.nodes}"
            )

        def choose(
            rows: LawRows, counts: Sequence[int], _depth: int, builder: TreeBuilder
        ) -> list[list[Guess]]:
            return [
                _children(rows, index, count, builder, random) for index, count in enumerate(counts)
            ]

        return (yield from grow_template(paths, choose, law, root, budget))


def _children(
    rows: LawRows, index: int, count: int, builder: TreeBuilder, random: RandomSource
) -> list[Guess]:
    """Returns a node's children in the order of testing: the drawn one, then the top."""
    log_probs = rows.log_probs[index]
    known = int((log_probs > -torch.inf).sum())
    top = torch.topk(log_probs, min(count - 1, known)).indices
    places: list[tuple[int, Draw, int]] = []
    if known > len(top):
        rest = log_probs.clone()
        rest[top] = -torch.inf
        ids = None if rows.ids is None else rows.ids[index : index + 1]
        q_row = builder.add_law(LawRows(rest.unsqueeze(0), ids), 0)
        places.append((random.categorical(rest.exp()), Draw.IID, q_row))
    places += [(place, Draw.POINT, -1) for place in top.tolist()]
    return [
        Guess(
            place if rows.ids is None else int(rows.ids[index, place]),
            draw,
            q_row,
            float(log_probs[place].exp()),
        )
        for place, draw, q_row in places
    ]
