"""All randomness of drafting and verifying goes through one small interface.

A policy and a verifier never share a stream: noise that made a draft token must not decide whether
it is accepted. The interface is small so that a test can enumerate every outcome of the
production code (`specdec.testing.enumerate`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.keyed_argmax import keyed_argmax
from specdec.kernels.philox import keyed_gumbel

_WORD = (1 << 64) - 1
_SHORT = 64  # weights that are all drawn at once rather than by blocks


class RandomSource(Protocol):
    """Where draws come from."""

    def uniform(self) -> float:
        """Returns a number in [0, 1)."""
        ...

    def bernoulli(self, probability: float) -> bool:
        """Returns True with the given probability; never at 0, always from 1 up."""
        ...

    def categorical(self, weights: Tensor) -> int:
        """Returns an index drawn in proportion to ``[n]`` non-negative weights."""
        ...

    def without_replacement(self, log_weights: Tensor) -> list[Iterator[tuple[int, float]]]:
        """Returns, for each row of ``[n, V]``, distinct indices drawn one after another.

        Each comes with its share of the row's whole weight. Nothing is drawn before it is asked
        for; a row ends when all its weight has been drawn.
        """
        ...

    def gumbel_argmax(self, scores: Tensor, position: int) -> int:
        """Returns argmax(scores + g) with the noise g keyed by the row and `position`."""
        ...

    def keyed_noise(self, position: int, token_ids: Tensor) -> Tensor:
        """Returns the noise g of `gumbel_argmax` at `position` for the ids, ``[k]`` float64."""
        ...


class SeededRandom:
    """The production source: a Philox stream of its own, and noise keyed by (seed, row).

    Args:
        seed: of the call; its low 64 bits count.
        row: number of the row.
        stream: number of the source among the row's.
    """

    def __init__(self, seed: int, row: int, stream: int) -> None:
        self.seed = seed & _WORD
        self.row = row
        # typed: numpy would turn a list with a word from 2**63 up into floats and lose its low bits
        key = np.array([self.seed, (row << 8) | stream], dtype=np.uint64)
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def uniform(self) -> float:
        """Returns a number in [0, 1)."""
        return float(self._generator.random())

    def bernoulli(self, probability: float) -> bool:
        """Returns True with the given probability."""
        return self.uniform() < probability

    def categorical(self, weights: Tensor) -> int:
        """Returns an index drawn in proportion to the weights, by inverse CDF in float64."""
        cumulative = torch.cumsum(weights, dim=-1, dtype=torch.float64)
        total = float(cumulative[-1])
        if not 0.0 < total < float("inf"):
            raise ValueError(f"weights must have a positive, finite sum; got {total}")
        # right: the first index whose cumulative weight EXCEEDS the draw, so never one of weight 0
        threshold = torch.tensor(
            self._generator.random() * total, dtype=torch.float64, device=weights.device
        )
        index = int(torch.searchsorted(cumulative, threshold, right=True))
        if index < len(weights):
            return index
        return int(torch.nonzero(weights)[-1])  # the product rounded up to the total

    def without_replacement(self, log_weights: Tensor) -> list[Iterator[tuple[int, float]]]:
        """Returns draws by a race of all weights, or by inverse CDF over blocks of a long row."""
        # a row that names no token has no softmax
        weights = torch.softmax(log_weights, dim=-1).nan_to_num(0.0).numpy(force=True)
        if weights.shape[1] <= _SHORT:
            return _races(weights, self._generator)
        return [_BlockedDraws(row, self._generator) for row in weights]

    def gumbel_argmax(self, scores: Tensor, position: int) -> int:
        """Returns argmax(scores + g)."""
        return keyed_argmax(scores, self.seed, self.row, position)

    def keyed_noise(self, position: int, token_ids: Tensor) -> Tensor:
        """Returns the noise of `gumbel_argmax` for the ids."""
        return keyed_gumbel(self.seed, self.row, position, token_ids)


def _races(
    weights: np.ndarray, generator: np.random.Generator
) -> list[Iterator[tuple[int, float]]]:
    """Returns draws without replacement from a few weights a row, all of them drawn at once.

    Exponential clocks of the weights as rates: the order in which they ring is that of draws.
    """
    with np.errstate(divide="ignore"):
        times = generator.standard_exponential(weights.shape) / weights
    order = np.argsort(times, axis=1)
    shares = weights[np.arange(len(weights))[:, None], order]  # take_along_axis takes twice as long
    return [
        iter(list(zip(places, values, strict=True))[: values.index(0.0) if 0.0 in values else None])
        for places, values in zip(order.tolist(), shares.tolist(), strict=True)
    ]


class _BlockedDraws:
    """Draws without replacement from one long row: O(sqrt V) a draw after O(V) to begin with.

    The same law as Gumbel-top-k in falling order of perturbed values (Kool et al., arXiv
    1903.06059): each draw is by inverse CDF, first over blocks, then inside one, and a drawn
    weight is set to zero.
    """

    def __init__(self, weights: np.ndarray, generator: np.random.Generator) -> None:
        self._block = math.isqrt(len(weights))
        padded = np.zeros(len(weights) + -len(weights) % self._block, dtype=weights.dtype)
        padded[: len(weights)] = weights
        self._weights = padded.reshape(-1, self._block)
        self._sums = self._weights.sum(axis=1, dtype=np.float64)
        self._generator = generator

    def __iter__(self) -> _BlockedDraws:
        return self

    def __next__(self) -> tuple[int, float]:
        cumulative = np.cumsum(self._sums)
        if not cumulative[-1] > 0.0:
            raise StopIteration
        threshold = self._generator.random() * cumulative[-1]
        # right: the first whose cumulative weight EXCEEDS the draw, so never one of weight 0
        block = min(int(np.searchsorted(cumulative, threshold, "right")), len(cumulative) - 1)
        inside = np.cumsum(self._weights[block], dtype=np.float64)
        rest = threshold - (cumulative[block - 1] if block else 0.0)
        place = int(np.searchsorted(inside, rest, "right"))
        if place == self._block or self._weights[block, place] == 0.0:  # the sums round apart
            block, place = divmod(int(np.argmax(self._weights)), self._block)
        weight = float(self._weights[block, place])
        self._weights[block, place] = 0.0
        self._sums[block] = self._weights[block].sum(dtype=np.float64)
        return block * self._block + place, weight


def draws_without_replacement(
    source: RandomSource, log_weights: Tensor
) -> list[Iterator[tuple[int, float]]]:
    """Returns what `RandomSource.without_replacement` does, as categorical draws of `source`.

    The reference beside the production source, and what a test enumerates.
    """

    def draws(weights: Tensor) -> Iterator[tuple[int, float]]:
        left = weights.clone()
        while bool((left > 0).any()):
            index = source.categorical(left)
            left[index] = 0.0
            yield index, float(weights[index])

    return [draws(row) for row in torch.softmax(log_weights, dim=-1)]


class RowStreams(NamedTuple):
    """The two sources of one row."""

    draft: RandomSource
    verify: RandomSource


def row_streams(seed: int, row: int) -> RowStreams:
    """Returns fresh streams for a row; they depend on the seed and the row's number alone."""
    return RowStreams(SeededRandom(seed, row, stream=0), SeededRandom(seed, row, stream=1))


def draw_seed() -> int:
    """Returns a seed from torch's global CPU generator, so that torch.manual_seed governs it."""
    return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
