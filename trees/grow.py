"""Drives the policies of a batch in lockstep: one draft call a level for all rows together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specdec.trees.tree import DraftTree
from specdec.types import DraftLaw, GrowPlan, LawRows

Expand = Callable[[Sequence[tuple[DraftLaw, Sequence[int]]]], list[LawRows]]


def grow_trees(plans: Sequence[tuple[DraftLaw, GrowPlan]], expand: Expand) -> list[DraftTree]:
    """Returns the tree of each plan.

    Args:
        plans: a law and the policy's plan over it, for each row.
        expand: answers the rows' requests of one level, as `Drafter.expand`.
    """
    trees: dict[int, DraftTree] = {}
    requests: dict[int, Sequence[int]] = {}

    def advance(index: int, answer: LawRows | None) -> None:
        plan = plans[index][1]
        try:
            requests[index] = next(plan) if answer is None else plan.send(answer)
        except StopIteration as stop:
            trees[index] = stop.value

    for index in range(len(plans)):
        advance(index, None)
    while requests:
        waiting = sorted(requests)
        answers = expand([(plans[index][0], requests.pop(index)) for index in waiting])
        for index, answer in zip(waiting, answers, strict=True):
            advance(index, answer)
    return [trees[index] for index in range(len(plans))]
