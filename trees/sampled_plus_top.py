"""One drawn child, tested first, beside the most probable ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.errors import ConfigError
from specdec.random import RandomSource
from specdec.trees.base import BasePolicy
from specdec.trees.build import TreeBuilder
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
        if len(branching_template(branching)) > budget.nodes:
            raise ConfigError(
                f"branching {branching} makes {len(branching_template(branching))} nodes, "
                f"node_budget is {budget.nodes}"
            )
        builder = TreeBuilder(root.token)
        level = [0]
        for count in branching[: budget.depth]:
            rows = yield [builder.handles[node] for node in level]
            below = []
            for index, node in enumerate(level):
                for place, draw, q_row in _choose(rows, index, count, builder, random):
                    token = place if rows.ids is None else int(rows.ids[index, place])
                    handle = law.extend(builder.handles[node], token)
                    chance = float(rows.log_probs[index, place].exp())
                    below.append(builder.add(node, token, handle, draw, q_row, chance))
            level = below
            if not level:
                break
        return builder.build()


def _choose(
    rows: LawRows, index: int, count: int, builder: TreeBuilder, random: RandomSource
) -> list[tuple[int, Draw, int]]:
    """Returns (place in the row, draw, law) of a node's children, in the order of testing."""
    log_probs = rows.log_probs[index]
    known = int((log_probs > -torch.inf).sum())
    top = torch.topk(log_probs, min(count - 1, known)).indices
    children: list[tuple[int, Draw, int]] = []
    rest: Tensor = log_probs.clone()
    rest[top] = -torch.inf
    if known > len(top):
        ids = None if rows.ids is None else rows.ids[index : index + 1]
        q_row = builder.add_law(LawRows(rest.unsqueeze(0), ids), 0)
        children.append((random.categorical(rest.exp()), Draw.IID, q_row))
    return children + [(place, Draw.POINT, -1) for place in top.tolist()]
