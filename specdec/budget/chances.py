"""What became of nodes of which a drafter claimed a chance."""

from __future__ import annotations

import numpy as np
from scipy.optimize import isotonic_regression

from specdec.types import StepOutcome

_EDGES = np.array([0.005, 0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.3, 0.45, 0.6, 0.75, 0.87, 0.95])
_BOUNDS = np.concatenate([[0.0], _EDGES, [1.0]])
_CENTRES = (_BOUNDS[1:] + _BOUNDS[:-1]) / 2
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
    """

    def __init__(self) -> None:
        self._hits = np.zeros(len(_EDGES) + 1)
        self._trials = np.zeros(len(_EDGES) + 1)
        self._claims = np.array([_FIRST_TRUST * _TRUST_TRIALS, _TRUST_TRIALS])  # came true, and all
        self._shares: np.ndarray | None = None  # what the counts say, until they change
        self._records: dict[int, list[float]] = {}  # a row's accepted nodes, and those expected

    def expected(self, row: int, claimed: np.ndarray) -> np.ndarray:
        """Returns how many nodes of a row become text, for each of ``[n]`` claimed chances."""
        values: np.ndarray = self._all()[np.searchsorted(_EDGES, claimed)] * self._factor(row)
        return values

    def least_claim(self, row: int, wanted: float) -> float:
        """Returns the claimed chance from which nodes of a row become text so often."""
        enough = np.flatnonzero(self._all() * self._factor(row) >= wanted)
        return float(_BOUNDS[enough[0]] if len(enough) else _EDGES[-1])

    def observe(self, outcome: StepOutcome) -> None:
        """Counts which of the scored nodes became text."""
        claimed = outcome.tree.path_chances[1:]
        became_text = np.zeros(len(claimed))
        became_text[[node - 1 for node in outcome.path]] = 1.0
        buckets = np.searchsorted(_EDGES, claimed)
        expected = float(self._all()[buckets].sum())
        self._hits *= _MEMORY
        self._trials *= _MEMORY
        np.add.at(self._hits, buckets, became_text)
        np.add.at(self._trials, buckets, 1.0)
        self._claims *= _TRUST_MEMORY
        self._claims += (len(outcome.path), _CENTRES[buckets].sum())
        self._shares = None
        record = self._records.setdefault(outcome.row, [0.0, 0.0])
        record[0] = _ROW_MEMORY * record[0] + len(outcome.path)
        record[1] = _ROW_MEMORY * record[1] + expected

    def stop(self, row: int) -> None:
        """Drops a row's own record."""
        self._records.pop(row, None)

    def _all(self) -> np.ndarray:
        """Returns the share of each bucket."""
        if self._shares is None:
            weights = self._trials + _PRIOR_TRIALS
            came_true, claimed = self._claims
            prior = np.minimum(came_true / claimed * _CENTRES, 1.0)
            counted = (self._hits + _PRIOR_TRIALS * prior) / weights
            # a larger chance is not claimed for a worse node, so buckets learn from each other
            self._shares = isotonic_regression(counted, weights=weights).x
        shares: np.ndarray = self._shares
        return shares

    def _factor(self, row: int) -> float:
        accepted, expected = self._records.get(row, (0.0, 0.0))
        return (accepted + _ROW_TRIALS) / (expected + _ROW_TRIALS)
