"""How many levels of a tree are worth a draft call each."""

from __future__ import annotations

_FIRST = 4
_DEEPER = 0.6  # guess of the share of texts that get from an untried level to the next
_MEMORY = 0.95  # for each step, as everything that a budget counts


class Levels:
    """Counts how deep trees became text, and weighs a level more against its draft call.

    Args:
        most: levels there can be.
    """

    def __init__(self, most: int) -> None:
        self._hits = [0.0] * most
        self._trials = [0.0] * most
        self._allowed = min(_FIRST, most)

    def observe(self, depth: int, accepted: int) -> None:
        """Counts a step.

        Args:
            depth: levels of the tree that was scored.
            accepted: of them that became text.
        """
        self._hits = _remembered(self._hits, accepted)
        self._trials = _remembered(self._trials, depth)
        if accepted >= self._allowed:
            self._allowed = min(2 * self._allowed, len(self._hits))

    def reach(self) -> list[float]:
        """Returns the chance that a text gets to each level, were it drafted."""
        chances = []
        above = 1.0
        for hits, trials in zip(self._hits, self._trials, strict=True):
            above = min(above, (hits + _DEEPER * above) / (trials + 1.0))
            chances.append(above)
        return chances

    def best(self, pass_seconds: float, level_seconds: float) -> int:
        """Returns the number of levels, at least 1, that gives the most tokens a second.

        Args:
            pass_seconds: of the target's pass, whatever is drafted.
            level_seconds: of a draft call.
        """
        best, highest, tokens = 1, 0.0, 1.0
        for level, chance in enumerate(self.reach()[: self._allowed], 1):
            tokens += chance
            rate = tokens / (pass_seconds + level_seconds * level)
            if rate > highest:
                best, highest = level, rate
        return best


def _remembered(counts: list[float], levels: int) -> list[float]:
    """Returns the counts, fading, with one more at each of the first levels."""
    return [_MEMORY * count + (level < levels) for level, count in enumerate(counts)]
