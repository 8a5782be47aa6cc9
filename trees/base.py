"""What most policies share: they learn nothing from what became of their trees."""

from __future__ import annotations

from specdec.random import RandomSource
from specdec.types import Budget, DraftLaw, Draw, GrowPlan, Root, StepOutcome


class BasePolicy:
    """A policy that keeps no state; subclasses give `grow`."""

    name = ""
    draws: frozenset[Draw] = frozenset()

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        raise NotImplementedError

    def observe(self, outcome: StepOutcome) -> None:
        """Learns from a finished step."""
