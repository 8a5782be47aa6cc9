"""Best-first trees from a law that is looked up node by node."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import NamedTuple, TypeGuard

from specdec.errors import LogitsError
from specdec.trees.tree import DraftTree
from specdec.types import Budget, DraftLaw, Draw, Guesses, ListedLaw, Root

LIKELY_CHILD = 0.7  # few children are likelier, so what would need one is not looked up
_ROUNDING = 1e-3
_UNKNOWN = -1  # in place of a rank: before any, so that equal values do not change the order
_NOTHING = Guesses((), ())


class HeapLimits(NamedTuple):
    """What a policy lets the trees be that `grow_by_heap` grows.

    Attributes:
        max_branching: the most children of a node.
        max_depth: the deepest level.
        draw: how the nodes came to be.
    """

    max_branching: int
    max_depth: int
    draw: Draw


def is_listed(law: DraftLaw) -> TypeGuard[ListedLaw]:
    """Tells whether a law answers node by node; isinstance of a protocol takes ten times longer."""
    return callable(getattr(law, "guesses", None)) and callable(getattr(law, "bound", None))


def grow_by_heap(
    law: ListedLaw,
    root: Root,
    budget: Budget,
    *,
    max_branching: int,
    max_depth: int,
    draw: Draw = Draw.POINT,
    weigh: Callable[[int, int], Guesses] | None = None,
) -> DraftTree:
    """Returns the tree of `grow_best_first`: the `budget.nodes` likeliest paths.

    The heap holds, for every node, its likeliest child that is not in the tree yet; or, for one
    that was not looked up yet, the bound on what such a child is worth. Of a tree of 64 nodes some
    30 never need a look. Nodes stand in the order of their paths' chances; of equal ones the
    shallower comes first.

    Args:
        law: the drafter's guess.
        root: where the tree starts.
        budget: nodes, depth and the least chance of a path.
        max_branching: the most children of a node.
        max_depth: the deepest level, whatever the budget.
        draw: how the nodes came to be.
        weigh: gives what may follow a handle, of which the depth is the second argument, where
            that is worth something else than the law's chances; those are then not bounded by it.

    Raises:
        LogitsError: if the law holds NaN, or a chance above one.
    """
    tokens, parents, handles, chances = [root.token], [-1], [0], [math.nan]
    paths, laws = [1.0], [_NOTHING]
    extend, bound = law.extend, law.bound if weigh is None else _unbounded
    deepest, least = min(budget.depth, max_depth), budget.least_chance
    # (negative chance of the path, depth, parent, rank among its children)
    heap: list[tuple[float, int, int, int]] = []

    def look_up(node: int, depth: int) -> None:
        handle = handles[node]
        own = law.guesses(handle) if weigh is None else weigh(handle, depth)
        laws[node] = _checked(own)
        if own.tokens:
            heappush(heap, (-paths[node] * own.chances[0], depth, node, 0))

    if deepest and budget.nodes:
        look_up(0, 1)
    while heap:
        value, depth, parent, rank = heappop(heap)
        if -value < least:
            break
        if rank == _UNKNOWN:
            look_up(parent, depth)
            continue
        own = laws[parent]
        token = own.tokens[rank]
        node = len(tokens)
        tokens.append(token)
        parents.append(parent)
        handle = extend(handles[parent], token)
        handles.append(handle)
        chances.append(own.chances[rank])
        if node == budget.nodes:
            break
        paths.append(-value)
        rank += 1
        if rank < len(own.tokens) and rank < max_branching:
            heappush(heap, (-paths[parent] * own.chances[rank], depth, parent, rank))
        laws.append(_NOTHING)
        if depth < deepest and -value * LIKELY_CHILD >= least:
            if 2 * node < budget.nodes:  # the first nodes nearly all need it
                look_up(node, depth + 1)
            else:
                heappush(heap, (value * bound(handle), depth + 1, node, _UNKNOWN))
    return DraftTree.from_lists(
        tokens,
        parents,
        [int(Draw.POINT), *[int(draw)] * (len(tokens) - 1)],
        chances=chances,
        handles=handles,
    )


def _unbounded(_handle: int) -> float:
    return 1.0


def _checked(guesses: Guesses) -> Guesses:
    if guesses.tokens and not guesses.chances[0] <= 1.0 + _ROUNDING:  # NaN is not either
        raise LogitsError(
            f"the draft law gives token {guesses.tokens[0]} the chance {guesses.chances[0]}: "
            "drafters must guess with chances between 0 and 1"
        )
    return guesses
