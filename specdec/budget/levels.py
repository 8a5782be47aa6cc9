"""How many levels of a tree are worth a draft call each."""

from __future__ import annotations

_FIRST = 4
_DEEPER = 0.6  # guess of the share of texts that get from an untried level to the next
_MEMORY = 0.95  # for each step, as everything that a budget counts
_HEAVIEST = 2.0**64


class Levels:
    """Counts how deep trees became text, and weighs a level more against its draft call.

    Args:
        most: levels there can be.
    """

    def __init__(self, most: int) -> None:
        self._hits = [0.0] * most
        self._trials = [0.0] * most
        self._weight = 1.0  # of a step; growing, so that what was counted need not be faded
        self._allowed = min(_FIRST, most)

    def observe(self, depth: int, accepted: int) -> None:
        """Counts a step.

        Args:
            depth: levels of the tree that was scored.
            accepted: of them that became text.
        """
        self._weight /= _MEMORY
        if self._weight > _HEAVIEST:
            self._hits = [count / self._weight for count in self._hits]
            self._trials = [count / self._weight for count in self._trials]
            self._weight = 1.0
        for level in range(accepted):
            self._hits[level] += self._weight
        for level in range(depth):
            self._trials[level] += self._weight
        if accepted >= self._allowed:
            self._allowed = min(2 * self._allowed, len(self._hits))

    def reach(self) -> list[float]:
        """Returns the chance that a text gets to each level that may be drafted."""
        chances = []
        above, own = 1.0, self._weight
        for hits, trials in zip(self._hits[: self._allowed], self._trials, strict=False):
            above = min(above, (hits + _DEEPER * above * own) / (trials + own))
            chances.append(above)
        return chances

    def best(self, pass_seconds: float, level_seconds: float) -> int:
        """Returns the number of levels, at least 1, that gives the most tokens a second.

        Args:
            pass_seconds: of the target's pass, whatever is drafted.
            level_seconds: of a draft call.
        """
        best, highest, tokens = 1, 0.0, 1.0
        for level, chance in enumerate(self.reach(), 1):
            tokens += chance
            rate = tokens / (pass_seconds + level_seconds * level)
            if rate > highest:
                best, highest = level, rate
        return best
