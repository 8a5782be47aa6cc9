"""What became of nodes of which a drafter claimed a chance."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise

EDGES = [0.005, 0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.45, 0.6, 0.75, 0.87, 0.95]
_BOUNDS = [0.0, *EDGES, 1.0]
_CENTRES = [(low + high) / 2 for low, high in pairwise(_BOUNDS)]
_PRIOR_TRIALS = 4.0
_FIRST_TRUST = 1.0  # in what the drafter claims, before any was put to the test
_TRUST_TRIALS = 4.0  # claimed nodes that outweigh it
_TRUST_MEMORY = 0.97  # longer than a bucket's: it says what to think of a bucket that has forgotten
_MEMORY = 0.95  # for each step: a text changes its kind every few dozen tokens
_ROW_MEMORY = 0.9
_ROW_TRIALS = 2.0  # accepted tokens that a row's own record must outweigh


class RealisedChances:
    """Counts, in buckets of claimed chances and with a short memory, how many nodes became text.

    A bucket of which little is known is taken for what is claimed, times the share of all claims
    that came true. A row that does better or worse than the buckets say has a factor of its own.

    All in plain lists: for a tree of a few nodes numpy's calls take longer.
    """

    def __init__(self) -> None:
        self._hits = [0.0] * len(_CENTRES)
        self._trials = [0.0] * len(_CENTRES)
        self._came_true, self._claimed = _FIRST_TRUST * _TRUST_TRIALS, _TRUST_TRIALS
        self._shares: list[float] = []  # what the counts said when they were last asked
        self._changed = True  # since then
        self._records: dict[int, list[float]] = {}  # a row's accepted nodes, and those expected

    def expected(self, row: int, claimed: Iterable[float]) -> list[float]:
        """Returns how many nodes of a row become text, for each of the claimed chances."""
        shares = self.shares_of(row)
        return [shares[bisect_left(EDGES, chance)] for chance in claimed]

    def shares_of(self, row: int) -> list[float]:
        """Returns how many nodes of a row become text, by class of chance; `EDGES` end them."""
        factor = self._factor(row)
        return [share * factor for share in self._all()]

    def least_claim(self, row: int, wanted: float) -> float:
        """Returns the claimed chance from which nodes of a row become text so often."""
        factor = self._factor(row)
        for share, bound in zip(self._all(), _BOUNDS, strict=False):
            if share * factor >= wanted:
                return bound
        return EDGES[-1]

    def observe(self, row: int, claimed: Sequence[float], path: Sequence[int]) -> None:
        """Counts which of the scored nodes became text.

        Args:
            row: its number.
            claimed: chances of the paths to the nodes, the root's first.
            path: the nodes that did.
        """
        buckets = [bisect_left(EDGES, chance) for chance in claimed]
        shares = self._shares or self._all()  # those by which the nodes were chosen
        expected = sum([shares[bucket] for bucket in buckets[1:]])
        self._hits = [_MEMORY * count for count in self._hits]
        self._trials = [_MEMORY * count for count in self._trials]
        for bucket in buckets[1:]:
            self._trials[bucket] += 1.0
        for node in path:
            self._hits[buckets[node]] += 1.0
        hoped = sum([_CENTRES[bucket] for bucket in buckets[1:]])
        self._came_true = _TRUST_MEMORY * self._came_true + len(path)
        self._claimed = _TRUST_MEMORY * self._claimed + hoped
        self._changed = True
        record = self._records.setdefault(row, [0.0, 0.0])
        record[0] = _ROW_MEMORY * record[0] + len(path)
        record[1] = _ROW_MEMORY * record[1] + expected

    def stop(self, row: int) -> None:
        """Drops a row's own record."""
        self._records.pop(row, None)

    def _all(self) -> list[float]:
        """Returns the share of each bucket."""
        if self._changed:
            self._changed = False
            trust = self._came_true / self._claimed
            weights = [trials + _PRIOR_TRIALS for trials in self._trials]
            counted = [
                (hits + _PRIOR_TRIALS * min(trust * centre, 1.0)) / weight
                for hits, centre, weight in zip(self._hits, _CENTRES, weights, strict=True)
            ]
            # a larger chance is not claimed for a worse node, so buckets learn from each other
            self._shares = rising(counted, weights)
        return self._shares

    def _factor(self, row: int) -> float:
        accepted, expected = self._records.get(row, (0.0, 0.0))
        return (accepted + _ROW_TRIALS) / (expected + _ROW_TRIALS)


def rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Returns the numbers nearest to some values that never fall: weighted isotonic regression.

    Pools adjacent violators, as `scipy.optimize.isotonic_regression` does; behind a pass that call
    takes a tenth of a millisecond, and there is one in a step.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight and number of pooled values
    for value, weight in zip(values, weights, strict=True):
        mean, total, count = value, weight, 1
        while pools and pools[-1][0] >= mean:
            above, more, others = pools.pop()
            mean = (above * more + mean * total) / (more + total)
            total, count = more + total, others + count
        pools.append((mean, total, count))
    return [mean for mean, _, count in pools for _ in range(count)]
