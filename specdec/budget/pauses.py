"""When to leave drafting out: it costs time, and there are texts that no drafter guesses."""

from __future__ import annotations

import math

RATE = 0.15  # of the running mean
_PATIENCE = 3  # drafts at a loss before drafting is left out
_EXPLORATION = 0.005  # of the time, to learn whether a drafter that does not pay pays again
_LEARNING = 0.0025  # of the time, to go on learning while it is not asked
_LONG = 4  # steps of a pause, from which learning is rationed


class Pauses:
    """Leaves out drafting while drafts, on average, lose time; tries again after longer pauses.

    The pauses double, up to where a try takes half a percent of the time between tries. One good
    draft ends them if it gains more than the bad ones lost. Another text gets a try at once, but on
    credit: the pause behind it is longer by what was left of the one before.
    """

    def __init__(self) -> None:
        self._gain = 0.0  # seconds a draft, a running mean
        self._losing = 0
        self._owed = 0  # steps without a draft that are still to come
        self._pause = 0  # what the last try cost of them
        self._credit = 0
        self._unlearned = 0  # steps since the last that was learned from

    @property
    def paused(self) -> bool:
        """Whether the next step goes without a draft."""
        return self._owed > self._credit

    @property
    def exploring(self) -> bool:
        """Whether a draft is a try after a pause, made to learn from it."""
        return self._losing >= _PATIENCE

    @property
    def gain(self) -> float:
        """Seconds that a draft saves, a running mean."""
        return self._gain

    def quiet(self, learning: float, plain: float) -> int:
        """Returns how many steps of a pause are ahead in which there is nothing to learn either.

        Args:
            learning: as `learns` takes it.
            plain: that too.
        """
        worth = _LEARNING * plain
        if self._pause < _LONG or not worth:
            return 0
        due = math.ceil(learning / worth) - self._unlearned  # that step is learned from
        return max(0, min(self._owed - self._credit, due - 1))

    def skip(self) -> None:
        """Counts a step of the pause."""
        self._owed -= 1

    def learns(self, learning: float, plain: float) -> bool:
        """Returns whether a step of the pause is worth learning from, and counts it.

        Args:
            learning: seconds that it takes.
            plain: seconds of a step without drafting.
        """
        self._unlearned += 1
        if self._pause >= _LONG and self._unlearned * _LEARNING * plain < learning:
            return False
        self._unlearned = 0
        return True

    def resume(self) -> None:
        """Ends a pause: another text begins, of which nothing is known. One try may be owed."""
        self._credit = self._pause

    def drafted(self, gain: float, loss: float, plain: float) -> None:
        """Weighs a draft.

        Args:
            gain: seconds that it is expected to save, negative if it costs more.
            loss: seconds of a try that brings nothing.
            plain: seconds of a step without drafting.
        """
        self._credit = 0
        self._gain += RATE * (gain - self._gain)
        if self._gain > 0:
            self._losing = self._owed = 0
            return
        self._losing += 1
        if self._losing >= _PATIENCE:
            longest = math.ceil(loss / (_EXPLORATION * plain))
            self._pause = min(2 ** min(self._losing - _PATIENCE, 16), longest)
            self._owed += self._pause
