"""How often the r-th child of a node is accepted, counted as the text goes on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.types import StepOutcome

_PRIOR_STRENGTH = 8.0  # tests that the starting vector is worth
_MEMORY = 0.998  # the counts forget, as the text and the temperature change


class RankAcceptance:
    """Sequoia's positional acceptance vector (arXiv 2402.12374, section 3.1), measured online.

    Entry r is the chance that a node's r-th child is accepted when the node was. Shapes made from
    it depend on earlier steps only, so they tell nothing about the tokens to be drawn.

    Args:
        start: the vector before anything was counted.
    """

    def __init__(self, start: Sequence[float]) -> None:
        self._start = np.array(start)
        self._hits = np.zeros_like(self._start)
        self._tests = np.zeros_like(self._start)

    def vector(self) -> list[float]:
        """Returns the estimate, made to fall with the rank."""
        hits = self._hits + _PRIOR_STRENGTH * self._start
        falling: list[float] = np.minimum.accumulate(
            hits / (self._tests + _PRIOR_STRENGTH)
        ).tolist()
        return falling

    def observe(self, outcome: StepOutcome) -> None:
        """Counts the nodes of the accepted path that had children."""
        tree, path = outcome.tree, list(outcome.path)
        # a row that ended inside its path was cut: its last node's children were never tested
        visited = [0, *path][: len(outcome.emitted)]
        for place, node in enumerate(visited):
            count = min(len(tree.children[node]), len(self._hits))
            if count == 0:
                continue
            self._hits *= _MEMORY
            self._tests *= _MEMORY
            self._tests[:count] += 1.0
            if place < len(path):
                rank = tree.children[node].index(path[place])
                if rank < count:
                    self._hits[rank] += 1.0
