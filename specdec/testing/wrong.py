"""The worst drafter there can be: sure of itself, and never right."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.drafters.base import BaseDrafter
from specdec.drafters.listed_law import ListedLaw
from specdec.types import DraftContext, DrafterNeeds, DraftLaw, Guesses, StepOutcome

_CHANCES = [0.9, 0.06, 0.03]


class AlwaysWrong(BaseDrafter):
    """Claims nine in ten for tokens that the target finds least likely.

    What it costs under ``node_budget="auto"`` is what the promise not to be slower than plain
    decoding is worth:

        python -m specdec bench --drafters none specdec.testing.wrong.AlwaysWrong

    The tokens are the least likely ones of the first step, in which it guesses nothing.
    """

    name = "always_wrong"
    needs = DrafterNeeds(every_step=False)

    def __init__(self) -> None:
        self._tokens: list[int] = []

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns the same law behind every text."""
        return _SameEverywhere(Guesses(self._tokens, _CHANCES[: len(self._tokens)]))

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Looks once for tokens that will not come."""
        if not self._tokens:
            logits = outcomes[0].logits[0]
            few = min(len(_CHANCES), len(logits) - 1)
            self._tokens = logits.topk(few, largest=False).indices.tolist()

    def reset(self) -> None:
        """Forgets the tokens."""
        self._tokens = []


class _SameEverywhere(ListedLaw):
    """A law that says the same at every node."""

    def __init__(self, guesses: Guesses) -> None:
        self._guesses = guesses
        self._handles = 1

    def extend(self, parent: int, token: int) -> int:
        self._handles += 1
        return self._handles - 1

    def guesses(self, handle: int) -> Guesses:
        return self._guesses

    def bound(self, handle: int) -> float:
        return max(self._guesses.chances, default=0.0)
