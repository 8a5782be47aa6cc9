"""How many levels of a tree are worth a draft call each."""

from __future__ import annotations

import numpy as np

_FIRST = 4
_DEEPER = 0.6  # guess of the share of texts that get from an untried level to the next
_MEMORY = 0.95  # for each step, as everything that a budget counts


class Levels:
    """Counts how deep trees became text, and weighs a level more against its draft call.

    Args:
        most: levels there can be.
    """

    def __init__(self, most: int) -> None:
        self._hits = np.zeros(most)
        self._trials = np.zeros(most)
        self._allowed = min(_FIRST, most)

    def observe(self, depth: int, accepted: int) -> None:
        """Counts a step.

        Args:
            depth: levels of the tree that was scored.
            accepted: of them that became text.
        """
        self._hits *= _MEMORY
        self._trials *= _MEMORY
        self._trials[:depth] += 1.0
        self._hits[:accepted] += 1.0
        if accepted >= self._allowed:
            self._allowed = min(2 * self._allowed, len(self._hits))

    def reach(self) -> np.ndarray:
        """Returns the chance that a text gets to each level, were it drafted."""
        chances = np.empty(len(self._hits))
        above = 1.0
        for level, (hits, trials) in enumerate(zip(self._hits, self._trials, strict=True)):
            above = min(above, (hits + _DEEPER * above) / (trials + 1.0))
            chances[level] = above
        return chances

    def best(self, pass_seconds: float, level_seconds: float) -> int:
        """Returns the number of levels, at least 1, that gives the most tokens a second.

        Args:
            pass_seconds: of the target's pass, whatever is drafted.
            level_seconds: of a draft call.
        """
        levels = np.arange(1, self._allowed + 1)
        tokens = 1.0 + np.cumsum(self.reach()[: self._allowed])
        return 1 + int(np.argmax(tokens / (pass_seconds + level_seconds * levels)))
