"""When to leave drafting out: it costs time, and there are texts that no drafter guesses."""

from __future__ import annotations

import math

_RATE = 0.15  # of the running mean
_PATIENCE = 3  # drafts at a loss before drafting is left out
_EXPLORATION = 0.02  # of the time, to learn whether a drafter that does not pay pays again


class Pauses:
    """Leaves out drafting while drafts, on average, lose time; tries again after longer pauses.

    The pauses double, up to where a try takes 2 % of the time between tries. One good draft ends
    them if it gains more than the bad ones lost.
    """

    def __init__(self) -> None:
        self._gain = 0.0  # seconds a draft, a running mean
        self._losing = 0
        self._left = 0  # steps of the pause

    @property
    def paused(self) -> bool:
        """Whether the next step goes without a draft."""
        return self._left > 0

    @property
    def exploring(self) -> bool:
        """Whether a draft is a try after a pause, made to learn from it."""
        return self._losing >= _PATIENCE

    def skip(self) -> None:
        """Counts a step of the pause."""
        self._left -= 1

    def resume(self) -> None:
        """Ends a pause: another text begins, of which nothing is known."""
        self._left = 0

    def drafted(self, gain: float, loss: float, plain: float) -> None:
        """Weighs a draft.

        Args:
            gain: seconds that it is expected to save, negative if it costs more.
            loss: seconds of a try that brings nothing.
            plain: seconds of a step without drafting.
        """
        self._gain += _RATE * (gain - self._gain)
        if self._gain > 0:
            self._losing = 0
            return
        self._losing += 1
        if self._losing >= _PATIENCE:
            longest = math.ceil(loss / (_EXPLORATION * plain))
            self._left = min(2 ** min(self._losing - _PATIENCE, 16), longest)
