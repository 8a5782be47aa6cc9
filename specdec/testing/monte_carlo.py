"""Chi-square tests with a stated power, and keyed noise for many rows at once.

Keyed noise is continuous, so what is drawn with it cannot be enumerated; it is sampled instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from specdec.kernels.philox import philox_4x32
from specdec.random import RowStreams, SeededRandom

Tokens = tuple[int, ...]

_SMALLEST_EXPECTED = 5.0  # the usual rule for the approximation by a continuous law


class ChiSquare(NamedTuple):
    """Pearson's statistic of a sample against a law."""

    statistic: float
    degrees: int

    def rejects(self, false_alarm: float) -> bool:
        """Whether the law is rejected; a right one is with probability `false_alarm`."""
        return bool(self.statistic > stats.chi2.isf(false_alarm, self.degrees))

    def miss_probability(self, noncentrality: float, false_alarm: float) -> float:
        """Returns how likely a wrong law of this noncentrality passes the test.

        Args:
            noncentrality: N sum (p' - p)^2 / p, for N samples from p' tested against p.
            false_alarm: as for `rejects`.
        """
        threshold = stats.chi2.isf(false_alarm, self.degrees)
        return float(stats.ncx2.cdf(threshold, self.degrees, noncentrality))


def chi_square(samples: Iterable[Tokens], law: Mapping[Tokens, float]) -> ChiSquare:
    """Returns the test of independent samples against a law.

    Raises:
        ValueError: if an outcome is expected too rarely for the test to hold.
    """
    counts = Counter(samples)
    total = sum(counts.values())
    if total * min(law.values()) < _SMALLEST_EXPECTED:
        raise ValueError(f"{total} samples are too few: an outcome is expected less than 5 times")
    if counts.keys() - law.keys():
        return ChiSquare(float("inf"), len(law) - 1)
    statistic = sum((counts[x] - total * p) ** 2 / (total * p) for x, p in law.items())
    return ChiSquare(statistic, len(law) - 1)


def noise_table(seed: int, num_rows: int, num_positions: int) -> Tensor:
    """Returns the keyed noise of tokens 0..3, ``[num_rows, num_positions, 4]`` float64."""
    rows = torch.arange(num_rows, dtype=torch.int64).unsqueeze(1)
    positions = torch.arange(num_positions, dtype=torch.int64).unsqueeze(0)
    zero = torch.zeros((), dtype=torch.int64)
    bits = torch.stack(philox_4x32((zero, positions, rows, zero), seed), dim=-1)
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


class TabulatedRandom(SeededRandom):
    """`SeededRandom` with its noise looked up: the same numbers, a hundred times faster.

    Args:
        seed: as for `SeededRandom`.
        row: as for `SeededRandom`.
        stream: as for `SeededRandom`.
        table: `noise_table` of that seed.
    """

    def __init__(self, seed: int, row: int, stream: int, table: Tensor) -> None:
        super().__init__(seed, row, stream)
        self._noise = table[row]

    def gumbel_argmax(self, scores: Tensor, position: int) -> int:
        """Returns argmax(scores + g)."""
        return int(torch.argmax(scores.double() + self._noise[position, : len(scores)]))

    def keyed_noise(self, position: int, token_ids: Tensor) -> Tensor:
        """Returns the noise g at `position` for the ids."""
        return self._noise[position, token_ids]


def tabulated_streams(seed: int, row: int, table: Tensor) -> RowStreams:
    """Returns what `specdec.random.row_streams` does, with the noise looked up."""
    return RowStreams(TabulatedRandom(seed, row, 0, table), TabulatedRandom(seed, row, 1, table))
