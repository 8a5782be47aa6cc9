"""Best-first trees from a law that is looked up node by node."""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import TypeGuard

from specdec.errors import LogitsError
from specdec.trees.tree import DraftTree
from specdec.types import Budget, DraftLaw, Draw, Guesses, ListedLaw, Root

LIKELY_CHILD = 0.7  # few children are likelier, so what would need one is not looked up
_ROUNDING = 1e-3
_NOTHING = Guesses((), ())


def is_listed(law: DraftLaw) -> TypeGuard[ListedLaw]:
    """Tells whether a law answers node by node; isinstance of a protocol takes ten times longer."""
    return callable(getattr(law, "guesses", None))


def grow_by_heap(
    law: ListedLaw,
    root: Root,
    budget: Budget,
    *,
    max_branching: int,
    max_depth: int,
    draw: Draw = Draw.POINT,
) -> DraftTree:
    """Returns the tree of `grow_best_first`: the `budget.nodes` likeliest paths.

    The heap holds, for every node, its likeliest child that is not in the tree yet. Nodes stand in
    the order of their paths' chances; of equal ones the shallower comes first.

    Args:
        law: the drafter's guess.
        root: where the tree starts.
        budget: nodes, depth and the least chance of a path.
        max_branching: the most children of a node.
        max_depth: the deepest level, whatever the budget.
        draw: how the nodes came to be.

    Raises:
        LogitsError: if the law holds NaN, or a chance above one.
    """
    tokens, parents, handles, chances = [root.token], [-1], [0], [math.nan]
    paths, laws = [1.0], [_checked(law.guesses(0))]
    deepest, least = min(budget.depth, max_depth), budget.least_chance
    # (negative chance of the path, depth, parent, rank among its children)
    heap: list[tuple[float, int, int, int]] = []
    if laws[0].tokens and deepest and budget.nodes:
        heap.append((-laws[0].chances[0], 1, 0, 0))
    while heap:
        value, depth, parent, rank = heappop(heap)
        if -value < least:
            break
        own = laws[parent]
        token = own.tokens[rank]
        node = len(tokens)
        tokens.append(token)
        parents.append(parent)
        handles.append(law.extend(handles[parent], token))
        chances.append(own.chances[rank])
        if node == budget.nodes:
            break
        paths.append(-value)
        rank += 1
        if rank < len(own.tokens) and rank < max_branching:
            heappush(heap, (-paths[parent] * own.chances[rank], depth, parent, rank))
        if depth < deepest and -value * LIKELY_CHILD >= least:
            below = _checked(law.guesses(handles[node]))
            if below.tokens:
                heappush(heap, (value * below.chances[0], depth + 1, node, 0))
        else:
            below = _NOTHING
        laws.append(below)
    return DraftTree.from_lists(
        tokens,
        parents,
        [int(Draw.POINT), *[int(draw)] * (len(tokens) - 1)],
        chances=chances,
        handles=handles,
    )


def _checked(guesses: Guesses) -> Guesses:
    if guesses.tokens and not guesses.chances[0] <= 1.0 + _ROUNDING:  # NaN is not either
        raise LogitsError(
            f"the draft law gives token {guesses.tokens[0]} the chance {guesses.chances[0]}: "
            "drafters must guess with chances between 0 and 1"
        )
    return guesses
