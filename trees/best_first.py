"""Best-first trees: the most probable nodes under a budget, level by level."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.random import RandomSource
from specdec.trees.build import TreeBuilder
from specdec.trees.tree import DraftTree
from specdec.types import Budget, DraftLaw, Draw, GrowPlan, LawRows, Root


class BestFirst:
    """The tree of the `budget.nodes` largest path probabilities under the draft law.

    A heap of slots would pop the same nodes one draft call at a time. Here each level is
    over-generated in one call and everything that the best nodes so far already beat is dropped:
    a child is never worth more than its parent, so the kept set is closed and is the heap's. Ties
    go to the node that was created first.

    Tokens are point masses: they are the top of the law, nothing is drawn.

    Args:
        max_branching: the most children a node may get.
        max_depth: the deepest level.
    """

    name = "best_first"
    draws = frozenset({Draw.POINT})

    def __init__(self, max_branching: int = 16, max_depth: int = 16) -> None:
        self._max_branching = max_branching
        self._max_depth = max_depth

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        tokens, parents, handles = [root.token], [-1], [0]
        values = torch.zeros(1)  # log path probability of each candidate, in order of creation
        frontier = [0]
        for _ in range(min(budget.depth, self._max_depth) if budget.nodes else 0):
            rows = yield [handles[i] for i in frontier]
            ids, log_probs = _ranked(rows, min(self._max_branching, budget.nodes))
            child_values = (values[frontier].unsqueeze(1) + log_probs).flatten()
            kept, threshold = _survivors(values, child_values, budget.nodes)
            if not kept:
                break
            width = ids.shape[1]
            flat_ids = ids.flatten().tolist()
            first = len(tokens)
            for i in kept:
                parent = frontier[i // width]
                tokens.append(flat_ids[i])
                parents.append(parent)
                handles.append(law.extend(handles[parent], flat_ids[i]))
            values = torch.cat([values, child_values[kept]])
            frontier = [i for i in range(first, len(tokens)) if values[i] >= threshold]
        return _select(tokens, parents, handles, values, budget.nodes)


def _ranked(rows: LawRows, count: int) -> tuple[Tensor, Tensor]:
    """Returns ids and log-probabilities ``[n, <= count]``, best first."""
    if rows.ids is not None:
        return rows.ids[:, :count], rows.log_probs[:, :count]
    top = torch.topk(rows.log_probs, min(count, rows.log_probs.shape[1]))
    return top.indices, top.values


def _survivors(values: Tensor, child_values: Tensor, nodes: int) -> tuple[list[int], float]:
    """Returns the children that may still be among the best `nodes`, and the value to reach."""
    threshold = -torch.inf
    merged = torch.cat([values[1:], child_values])
    if len(merged) > nodes:
        threshold = float(torch.topk(merged, nodes).values[-1])
    keep = (child_values >= threshold) & (child_values > -torch.inf)
    return torch.nonzero(keep).flatten().tolist(), threshold


def _select(
    tokens: list[int], parents: list[int], handles: list[int], values: Tensor, nodes: int
) -> DraftTree:
    """Returns the tree of the best `nodes` candidates; equal values in order of creation."""
    order = torch.sort(values[1:], descending=True, stable=True).indices[:nodes]
    builder = TreeBuilder(tokens[0])
    new_index = {0: 0}
    for candidate in sorted((order + 1).tolist()):
        parent = new_index[parents[candidate]]
        new_index[candidate] = builder.add(parent, tokens[candidate], handles[candidate])
    return builder.build()
