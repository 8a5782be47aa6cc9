"""From what a target once thought to the chance that it thinks so again, by counting."""

from __future__ import annotations

import numpy as np

from specdec.drafters.learning import LearnedState
from specdec.errors import StateError

# survivor-probability edges of the buckets
_EDGES = np.log(np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95], dtype=np.float32))
_PRIOR_STRENGTH = 20.0


class Calibration:
    """Counts how often a guess of a given rank and survivor share was the next token.

    Args:
        num_ranks: guesses of a row.
    """

    def __init__(self, num_ranks: int) -> None:
        buckets = len(_EDGES) + 1
        # before anything was counted: about half the share, since the context is another one
        share = np.exp(np.concatenate([_EDGES[:1] - 1, (_EDGES[1:] + _EDGES[:-1]) / 2, [0.0]]))
        prior = np.repeat(0.55 * share[None, :], num_ranks, axis=0)
        self.hits = prior * _PRIOR_STRENGTH
        self.trials = np.full((num_ranks, buckets), _PRIOR_STRENGTH)
        self._ranks = np.arange(num_ranks)
        self._table: np.ndarray | None = None

    @property
    def table(self) -> np.ndarray:
        """``[k, buckets]`` float32: the log-chance of a guess by rank and bucket."""
        if self._table is None:
            self._table = np.log(self.hits / self.trials).astype(np.float32)
        return self._table

    @staticmethod
    def buckets_of(log_shares: np.ndarray) -> np.ndarray:
        """Returns the bucket of each log-share."""
        return np.searchsorted(_EDGES, log_shares.astype(np.float32))

    def log_chance(self, log_shares: np.ndarray) -> np.ndarray:
        """Returns ``[n, k]`` float32 log-probabilities, falling along each row.

        Args:
            log_shares: ``[n, k]`` log of each guess's share among the k that were kept.
        """
        # the best guess stays first: a law's rows are sorted
        chance = np.minimum.accumulate(self.table[self._ranks, self.buckets_of(log_shares)], axis=1)
        # together the guesses cannot be more than certain
        excess = np.log(np.maximum(np.exp(chance).sum(axis=1, keepdims=True), 1.0))
        calibrated: np.ndarray = chance - excess
        return calibrated

    def record(self, log_shares: np.ndarray, ids: np.ndarray, emitted: np.ndarray) -> None:
        """Counts rows whose true next token has become known.

        Args:
            log_shares: ``[n, k]`` as in `log_chance`.
            ids: ``[n, k]`` the guesses; -1 stands for none and is not counted.
            emitted: ``[n]`` the tokens that came.
        """
        rows, ranks = np.nonzero(ids >= 0)
        buckets = self.buckets_of(log_shares[rows, ranks])
        np.add.at(self.trials, (ranks, buckets), 1.0)
        np.add.at(self.hits, (ranks, buckets), ids[rows, ranks] == emitted[rows])
        self._table = None

    def state(self) -> LearnedState:
        """Returns the counts."""
        return LearnedState({"hits": self.hits, "trials": self.trials})

    @staticmethod
    def restored(state: LearnedState, num_ranks: int) -> Calibration:
        """Returns the calibration of a state. Raises StateError if it does not fit."""
        calibration = Calibration(num_ranks)
        calibration.hits = state.array("hits", calibration.hits.shape, np.float64)
        calibration.trials = state.array("trials", calibration.trials.shape, np.float64)
        if not (calibration.hits > 0).all() or not (calibration.trials > 0).all():
            raise StateError("tables 'hits' and 'trials' must hold positive counts")
        return calibration
