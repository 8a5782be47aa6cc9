"""What a pass takes within a text, where a table was measured outside of it."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.cost import PassCost

_MEMORY = 0.98  # for each pass
# how sure the table is: in passes for its smallest pass, and for what nodes add in passes of twice
# that time; between passes of a text other code has run, and the machine has other guests
_PRIOR = (4.0, 0.3)
_LEAST_FACTOR = 0.1
_PREFIXES = 16  # tokens, by which lengths of prefixes are told apart
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
        # passes, what nodes add, its square, the time, what nodes add x the time
        self._sums = 0.0, 0.0, 0.0, 0.0, 0.0
        self._factors = (1.0, 1.0)
        self._known: dict[float, float] = {}  # of the table, behind prefixes of some length
        self._known_at = -1

    def of(self, nodes: Sequence[float], context: float) -> list[float]:
        """Returns seconds for numbers of nodes behind prefixes of such a length."""
        base, slope = self._factors
        foretold = self._foretold([1, *nodes], context)
        least = foretold[1] * (base - slope)
        return [least + slope * foretold[number] for number in nodes]

    def _foretold(self, nodes: Sequence[float], context: float) -> dict[float, float]:
        """Returns what the table says of numbers of nodes; asked once while a text grows a bit."""
        place = int(context) // _PREFIXES
        if place != self._known_at:
            self._known, self._known_at = {}, place
        for number in nodes:
            if number not in self._known:
                (self._known[number],) = self._cost.of([number], place * _PREFIXES)
        return self._known

    def scored(self, nodes: int, context: float, seconds: float) -> None:
        """Takes note of a pass."""
        if not self._follows:
            return
        foretold = self._foretold([1, nodes], context)
        least = foretold[1]
        more = foretold[nodes] / least - 1.0
        base, slope = self._factors
        took = min(seconds / least, _LONGEST * (base + slope * more))
        ones, mores, squares, tooks, products = self._sums
        ones = _MEMORY * ones + 1.0
        mores = _MEMORY * mores + more
        squares = _MEMORY * squares + more * more
        tooks = _MEMORY * tooks + took
        products = _MEMORY * products + more * took
        self._sums = ones, mores, squares, tooks, products
        # two equations, solved by hand: numpy's calls took longer than all the rest
        ones, squares = ones + _PRIOR[0], squares + _PRIOR[1]
        tooks, products = tooks + _PRIOR[0], products + _PRIOR[1]
        determinant = ones * squares - mores * mores
        base = (squares * tooks - mores * products) / determinant
        slope = (ones * products - mores * tooks) / determinant
        self._factors = (max(base, _LEAST_FACTOR), max(slope, _LEAST_FACTOR))
