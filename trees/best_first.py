"""Best-first trees: the most valuable nodes under a budget, level by level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from specdec.errors import ConfigError
from specdec.random import RandomSource
from specdec.trees.base import BasePolicy
from specdec.trees.heap import LIKELY_CHILD, HeapLimits, grow_by_heap, is_listed
from specdec.trees.native_law import NativeLaw
from specdec.trees.tree import DraftTree
from specdec.types import Budget, DraftLaw, Draw, GrowPlan, LawRows, Root

Candidates = tuple[np.ndarray, np.ndarray]  # ids [n, k] int64, log-values [n, k] float32
_LEAST_LOG = float(np.finfo(np.float32).min)  # below it is only what cannot be, -inf
# gives the candidates below the nodes of one level, best first, from the nodes' laws, their handles
# and the depth of the candidates
Weigh = Callable[[LawRows, Sequence[int], int], Candidates]


class BestFirst(BasePolicy):
    """The tree of the `budget.nodes` largest path probabilities under the draft law.

    Tokens are point masses: they are the top of the law, nothing is drawn. It maximises the
    expected number of accepted tokens if the law is the target's (OPT-Tree, arXiv 2406.17276).

    Args:
        max_branching: the most children a node may get.
        max_depth: the deepest level.

    Raises:
        ConfigError: if one is less than 1.
    """

    name = "best_first"
    draws = frozenset({Draw.POINT})

    def __init__(self, max_branching: int = 16, max_depth: int = 16) -> None:
        if max_branching < 1 or max_depth < 1:
            raise ConfigError(
                "max_branching and max_depth must be at least 1, got "
                f"{max_branching} and {max_depth}"
            )
        self._max_branching = max_branching
        self._max_depth = max_depth

    @property
    def limits(self) -> HeapLimits:
        """Of its trees."""
        return HeapLimits(self._max_branching, self._max_depth, Draw.POINT)

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        return (
            yield from grow_likeliest(
                law, root, budget, max_branching=self._max_branching, max_depth=self._max_depth
            )
        )


class TopN(BasePolicy):
    """EAGLE-2's tree: the best few nodes of each level are expanded, then the best of all kept.

    Narrower levels than `best_first` and so fewer rows a draft call; the same tree when no level
    has more promising nodes than `width`.

    Source: Li et al., EAGLE-2 (arXiv 2406.16858). Nodes are the top of the law, point masses: its
    reranking by a node's own probability is lossless for these, and would not be for drawn ones.

    Args:
        width: nodes expanded at each level, and children each may get.
        max_depth: the deepest level.

    Raises:
        ConfigError: if one is less than 1.
    """

    name = "top_n"
    draws = frozenset({Draw.POINT})

    def __init__(self, width: int = 10, max_depth: int = 6) -> None:
        self._width = width
        self._max_depth = max_depth

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""

        def weigh(rows: LawRows, _handles: Sequence[int], _depth: int) -> Candidates:
            return most_probable(rows, self._width)

        return (
            yield from grow_best_first(
                law, root, budget, weigh, max_depth=self._max_depth, width=self._width
            )
        )


def most_probable(rows: LawRows, count: int) -> Candidates:
    """Returns ids and log-probabilities ``[n, <= count]`` of each row's likeliest tokens."""
    if rows.ids is not None:
        ids, log_probs = rows.ids, rows.log_probs
    else:
        log_probs, ids = torch.topk(rows.log_probs, min(count, rows.log_probs.shape[1]))
    if log_probs.dtype is torch.bfloat16:  # numpy has none
        log_probs = log_probs.float()
    # slices of arrays take a third of the time that slices of tensors take
    return ids.numpy(force=True)[:, :count], log_probs.numpy(force=True)[:, :count]


def grow_likeliest(
    law: DraftLaw,
    root: Root,
    budget: Budget,
    *,
    max_branching: int,
    max_depth: int,
    draw: Draw = Draw.POINT,
) -> GrowPlan:
    """Grows the tree of the `budget.nodes` likeliest paths, node by node where the law can.

    Args:
        law: the drafter's guess.
        root: where the tree starts.
        budget: nodes, depth and the least chance of a path.
        max_branching: the most children of a node.
        max_depth: the deepest level, whatever the budget.
        draw: how the nodes came to be.
    """
    if isinstance(law, NativeLaw):
        return law.grow(root, budget, max_branching=max_branching, max_depth=max_depth, draw=draw)
    if is_listed(law):
        return grow_by_heap(
            law, root, budget, max_branching=max_branching, max_depth=max_depth, draw=draw
        )

    def weigh(rows: LawRows, _handles: Sequence[int], _depth: int) -> Candidates:
        return most_probable(rows, min(max_branching, budget.nodes))

    return (yield from grow_best_first(law, root, budget, weigh, max_depth=max_depth, draw=draw))


def grow_best_first(
    law: DraftLaw,
    root: Root,
    budget: Budget,
    weigh: Weigh,
    *,
    max_depth: int,
    width: int | None = None,
    draw: Draw = Draw.POINT,
) -> GrowPlan:
    """Grows the tree of the `budget.nodes` largest products of values along their paths.

    `grow_by_heap` takes the same nodes one draft call at a time. Here each level is
    over-generated in one call and everything that the best nodes so far already beat is dropped:
    a child is never worth more than its parent, so the kept set is closed and is the heap's. Ties
    go to the node that was created first.

    Args:
        law: the drafter's guess.
        root: where the tree starts.
        budget: nodes, depth and the least chance of a path.
        weigh: values the candidates of a level.
        max_depth: the deepest level, whatever the budget.
        width: the most nodes of a level that are expanded; None for all.
        draw: how the nodes came to be.
    """
    tokens, parents, handles = [root.token], [-1], [0]
    chances = [np.array([math.nan])]
    values = np.zeros(1, np.float32)  # log value of each candidate's path, in order of creation
    frontier = np.zeros(1, np.int64)
    least = math.log(budget.least_chance) if budget.least_chance else -math.inf
    for depth in range(1, min(budget.depth, max_depth) + 1 if budget.nodes else 1):
        asked = [handles[i] for i in frontier.tolist()]
        rows = yield asked
        ids, log_values = weigh(rows, asked, depth)
        child_values = (values[frontier][:, None] + log_values).ravel()
        kept = _survivors(values[1:], child_values, budget.nodes, least)
        if not len(kept):
            break
        above = frontier[kept // ids.shape[1]].tolist()
        own = ids.ravel()[kept].tolist()
        first = len(tokens)
        tokens += own
        parents += above
        handles += [law.extend(handles[p], token) for p, token in zip(above, own, strict=True)]
        chances.append(np.exp(log_values.ravel()[kept]))
        values = np.concatenate([values, child_values[kept]])
        frontier = first + np.flatnonzero(values[first:] + math.log(LIKELY_CHILD) >= least)
        if not len(frontier):
            break
        if width is not None and len(frontier) > width:
            best = np.argsort(-values[frontier], kind="stable")[:width]
            frontier = np.sort(frontier[best])
    best = 1 + np.argsort(-values[1:], kind="stable")[: budget.nodes]
    chosen = [0, *sorted(best.tolist())]
    places = {number: place for place, number in enumerate(chosen)}
    return DraftTree.from_lists(
        [tokens[number] for number in chosen],
        [-1, *(places[parents[number]] for number in chosen[1:])],
        [Draw.POINT, *[draw] * (len(chosen) - 1)],
        chances=np.concatenate(chances)[chosen],
        handles=[handles[number] for number in chosen],
    )


def _survivors(
    values: np.ndarray, child_values: np.ndarray, nodes: int, least: float
) -> np.ndarray:
    """Returns which children may still be among the best `nodes` of all candidates."""
    merged = np.concatenate([values, child_values])
    if len(merged) > nodes:
        least = max(least, float(np.partition(merged, -nodes)[-nodes]))
    return np.flatnonzero(child_values >= max(least, _LEAST_LOG))
