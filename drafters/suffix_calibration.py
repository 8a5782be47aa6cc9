"""How often a suffix match is right, counted as the text goes on."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from specdec.errors import StateError

OWN, STORED = 0, 1  # sources: this row's text, an earlier one
_SOURCES = 2
# match lengths 0, 1, 2, 3, 4, 5-6, 7-9, 10-15, 16 and more
LENGTH_BUCKETS = array("B", [0, 1, 2, 3, 4, 5, 5, 6, 6, 6, 7, 7, 7, 7, 7, 7, 8])
_LENGTHS = LENGTH_BUCKETS[-1] + 1
# upper ends of the share buckets, in 128ths: fine where the empty phrase's shares lie
_SHARE_ENDS = [1, 2, 4, 8, 16, 26, 40, 56, 72, 88, 104, 118, 128]
_SHARES = len(_SHARE_ENDS)
SHARE_BUCKETS = array("B", [bisect_right(_SHARE_ENDS, share) for share in range(128)])

# Before anything was counted a chance is a logistic function of these; fitted once to SmolLM2-135M
# on prompts of all kinds. A few trials overrule it.
_PRIOR_STRENGTH = 8.0
_BIAS, _LOGIT_OF_SHARE, _PER_LENGTH, _LATEST, _STORED, _EMPTY = -1.9, 0.9, 0.55, 0.5, -0.8, 0.9
_LONGEST_OF_PRIOR = 6


class SuffixCalibration:
    """Counts hits and trials of guesses by what is known of them beforehand.

    A cell is (source, match length, share, latest): whether the match is in this row's text or
    in an earlier one; its length in tokens; count / (total + 1) of the token among what
    followed the match, which grows with the evidence too (1 of 1 is a half, 3 of 3 three quarters);
    and whether the token is what followed last. The tables
    are no numpy arrays, since a guess looks up one cell; C code counts in the same memory.

    Attributes:
        shape: of the tables: sources, length buckets, share buckets, latest or not.
        hits_of_cells: float64, prior included.
        trials_of_cells: float64, prior included.
        chances: hits by trials of each cell.
    """

    shape = (_SOURCES, _LENGTHS, _SHARES, 2)

    def __init__(self) -> None:
        ends = np.array([0, *_SHARE_ENDS])
        share = (ends[1:] + ends[:-1]) / 256
        length = np.arange(_LENGTHS)
        of_length = _PER_LENGTH * length.clip(max=_LONGEST_OF_PRIOR) + _EMPTY * (length == 0)
        odds = (
            _BIAS
            + _LOGIT_OF_SHARE * np.log(share / (1 - share))[:, None]
            + of_length[:, None, None]
            + _LATEST * np.arange(2)
            + _STORED * np.arange(_SOURCES)[:, None, None, None]
        )
        chance = 1 / (1 + np.exp(-odds))
        self._set(_PRIOR_STRENGTH * chance, np.full(self.shape, _PRIOR_STRENGTH))

    def _set(self, hits: np.ndarray, trials: np.ndarray) -> None:
        self.hits_of_cells = array("d", hits.ravel())
        self.trials_of_cells = array("d", trials.ravel())
        self.chances = array("d", (hits / trials).ravel())

    @staticmethod
    def cells(
        source: int, length: int, ranked: Sequence[tuple[int, int]], total: int, latest: int
    ) -> list[int]:
        """Returns the cells of the guesses from one match.

        Args:
            source: OWN or STORED.
            length: of the match, in tokens.
            ranked: (token, count) of what followed.
            total: counts of all that followed, at least the sum of those in `ranked`.
            latest: the token that followed last.
        """
        bucket = LENGTH_BUCKETS[length] if length < len(LENGTH_BUCKETS) else _LENGTHS - 1
        base = 2 * _SHARES * (source * _LENGTHS + bucket)
        total += 1
        return [
            base + 2 * SHARE_BUCKETS[128 * count // total] + (token == latest)
            for token, count in ranked
        ]

    def record(self, cell: int, hit: bool) -> None:
        """Counts one guess whose true token has become known."""
        self.trials_of_cells[cell] += 1.0
        self.hits_of_cells[cell] += hit
        self.chances[cell] = self.hits_of_cells[cell] / self.trials_of_cells[cell]

    @property
    def hits(self) -> np.ndarray:
        """Hits ``[source, length, share, recency]``, prior included."""
        return np.array(self.hits_of_cells).reshape(self.shape)

    @property
    def trials(self) -> np.ndarray:
        """Trials of the same shape, prior included."""
        return np.array(self.trials_of_cells).reshape(self.shape)

    def restore(self, hits: np.ndarray, trials: np.ndarray) -> None:
        """Takes over counts, float64 of `shape`.

        Raises:
            StateError: if they are no counts.
        """
        if not (np.isfinite(trials) & (hits > 0) & (hits <= trials)).all():
            raise StateError("tables 'hits' and 'trials' must hold counts with 0 < hits <= trials")
        self._set(hits, trials)
