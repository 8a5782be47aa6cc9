"""Drives the policies of a batch in lockstep: one draft call a level for all rows together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specdec.errors import LogitsError
from specdec.trees.tree import DraftTree
from specdec.types import DraftLaw, GrowPlan, LawRows

_ROUNDING = 1e-3  # above log 1: laws of half precision

Expand = Callable[[Sequence[tuple[DraftLaw, Sequence[int]]]], list[LawRows]]


def grow_trees(plans: Sequence[tuple[DraftLaw, GrowPlan]], expand: Expand) -> list[DraftTree]:
    """Returns the tree of each plan.

    Args:
        plans: a law and the policy's plan over it, for each row.
        expand: answers the rows' requests of one level, as `Drafter.expand`.

    Raises:
        LogitsError: if a row holds NaN, or a probability above one.
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
            _check(answer)
            advance(index, answer)
    return [trees[index] for index in range(len(plans))]


def _check(rows: LawRows) -> None:
    """Refuses rows that are no log-probabilities; a NaN would win or lose every comparison."""
    if rows.log_probs.numel() == 0:
        return
    largest = float(rows.log_probs.max())  # NaN anywhere gives NaN
    if not largest <= _ROUNDING:
        what = "NaN" if largest != largest else f"a log-probability of {largest:.3g}, above 0"
        raise LogitsError(
            f"the draft law holds {what}: drafters must return log-probabilities (log_softmax of "
            "finite logits); a draft model in half precision may have overflowed"
        )
