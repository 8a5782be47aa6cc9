"""From what a target once thought to the chance that it thinks so again, by counting."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from specdec.drafters.learning import LearnedState
from specdec.errors import StateError

# survivor-probability edges of the buckets
_EDGES = np.log(np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95], dtype=np.float32))
# the bucket of every float16, by its bits: one look where a bisection would take twice as long
_FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
_FLOAT16[np.isnan(_FLOAT16)] = -np.inf  # of a damaged file: as unlikely as can be
BUCKETS = np.searchsorted(_EDGES, _FLOAT16).astype(np.uint8)
_BUCKETS = BUCKETS.tobytes()
_NUM_BUCKETS = len(_EDGES) + 1
_PRIOR_STRENGTH = 20.0


class Calibration:
    """Counts how often a guess of a given rank and survivor share was the next token.

    Args:
        num_ranks: guesses of a row.

    Attributes:
        hits: how often a guess was right, by rank and bucket: ``[num_ranks * buckets]`` float64.
            No numpy arrays, since a guess looks up one cell; C code counts in the same memory.
        trials: how often it was made.
        of_cells: hits by trials.
    """

    def __init__(self, num_ranks: int) -> None:
        # before anything was counted: about half the share, since the context is another one
        share = np.exp(np.concatenate([_EDGES[:1] - 1, (_EDGES[1:] + _EDGES[:-1]) / 2, [0.0]]))
        chance = np.repeat(0.55 * share[None, :], num_ranks, axis=0)
        self._set(_PRIOR_STRENGTH * chance, np.full(chance.shape, _PRIOR_STRENGTH))

    def _set(self, hits: np.ndarray, trials: np.ndarray) -> None:
        self.hits, self.trials = array("d", hits.ravel()), array("d", trials.ravel())
        self.of_cells = array("d", (hits / trials).ravel())

    def chances(self, share_bits: Sequence[int]) -> list[float]:
        """Returns the chance of each guess of a row, falling: a worse rank is not likelier.

        Args:
            share_bits: of each guess, the log of its share among those that were kept, as the bits
                of a float16.
        """
        falling, least, first, of_cells = [], 1.0, 0, self.of_cells
        for bits in share_bits:
            chance = of_cells[first + _BUCKETS[bits]]
            first += _NUM_BUCKETS
            if chance < least:
                least = chance
            falling.append(least)
        return falling

    def most(self, share_bits: Sequence[int]) -> float:
        """Returns the largest of `chances`."""
        return min(self.of_cells[_BUCKETS[share_bits[0]]], 1.0) if share_bits else 0.0

    def record(self, rank: int, share_bits: int, hit: bool) -> None:
        """Counts a guess whose true token has become known."""
        cell = _NUM_BUCKETS * rank + _BUCKETS[share_bits]
        self.hits[cell] += hit
        self.trials[cell] += 1.0
        self.of_cells[cell] = self.hits[cell] / self.trials[cell]

    def state(self) -> LearnedState:
        """Returns the counts."""
        hits, trials = np.array(self.hits), np.array(self.trials)
        shape = (-1, _NUM_BUCKETS)
        return LearnedState({"hits": hits.reshape(shape), "trials": trials.reshape(shape)})

    @staticmethod
    def restored(state: LearnedState, num_ranks: int) -> Calibration:
        """Returns the calibration of a state. Raises StateError if it does not fit."""
        calibration = Calibration(num_ranks)
        shape = (num_ranks, _NUM_BUCKETS)
        hits = state.array("hits", shape, np.float64)
        trials = state.array("trials", shape, np.float64)
        if not (np.isfinite(trials) & (hits > 0) & (hits <= trials)).all():
            raise StateError(
                "tables 'hits' and 'trials' must hold positive counts, hits at most trials"
            )
        calibration._set(hits, trials)
        return calibration
