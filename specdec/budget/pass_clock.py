"""What a pass takes within a text, where a table was measured outside of it."""

from __future__ import annotations

import numpy as np

from specdec.cost import PassCost

_MEMORY = 0.98  # for each pass
# how sure the table is: in passes for its smallest pass, and for what nodes add in passes of twice
# that time; between passes of a text other code has run, and the machine has other guests
_PRIOR = np.diag([4.0, 0.3])
_LONGEST = 2.0  # times what was foretold; more is a pause of the machine


class PassClock:
    """Corrects a table of pass costs by the passes of the text itself.

    Two factors follow the clock, by least squares with a short memory: one for the smallest pass,
    one for what more nodes add to it. The table gives their shape.

    Args:
        cost: seconds of a pass, by the table.
        follows: False to go by the table alone.
    """

    def __init__(self, cost: PassCost, *, follows: bool = True) -> None:
        self._cost = cost
        self._follows = follows
        self._products = np.zeros((2, 2))
        self._targets = np.zeros(2)
        self._factors = np.ones(2)

    def of(self, nodes: np.ndarray, context: float) -> np.ndarray:
        """Returns seconds for numbers of nodes (any shape) behind prefixes of such a length."""
        least = self._cost.of(np.array(1), context)
        base, slope = self._factors
        seconds: np.ndarray = base * least + slope * (self._cost.of(nodes, context) - least)
        return seconds

    def scored(self, nodes: int, context: float, seconds: float) -> None:
        """Takes note of a pass."""
        if not self._follows:
            return
        least = float(self._cost.of(np.array(1), context))
        more = float(self._cost.of(np.array(nodes), context)) - least
        row = np.array([1.0, more / least])
        foretold = float(row @ self._factors)
        self._products = _MEMORY * self._products + np.outer(row, row)
        self._targets = _MEMORY * self._targets + row * min(seconds / least, _LONGEST * foretold)
        factors = np.linalg.solve(self._products + _PRIOR, self._targets + _PRIOR.diagonal())
        self._factors = np.maximum(factors, 0.1)
