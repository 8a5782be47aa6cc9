"""All randomness of drafting and verifying goes through one small interface.

A policy and a verifier never share a stream: noise that made a draft token must not decide whether
it is accepted. The interface is small so that a test can enumerate every outcome of the
production code (`specdec.testing.enumerate`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.philox import LARGEST_GUMBEL, keyed_gumbel, keyed_gumbel_dense

_WORD = (1 << 64) - 1


class RandomSource(Protocol):
    """Where draws come from."""

    def bernoulli(self, probability: float) -> bool:
        """Returns True with the given probability; never at 0, always from 1 up."""
        ...

    def categorical(self, weights: Tensor) -> int:
        """Returns an index drawn in proportion to ``[n]`` non-negative weights."""
        ...

    def top_k_without_replacement(self, log_weights: Tensor, count: int) -> list[int]:
        """Returns up to `count` distinct indices drawn one after another, in order of drawing."""
        ...

    def gumbel_argmax(self, scores: Tensor, position: int) -> int:
        """Returns argmax(scores + g) with the noise g keyed by the row and `position`."""
        ...

    def keyed_noise(self, position: int, token_ids: Tensor) -> Tensor:
        """Returns the noise g of `gumbel_argmax` at `position` for the ids, ``[k]`` float64."""
        ...


class SeededRandom:
    """The production source: a Philox stream of its own, and noise keyed by (seed, row)."""

    def __init__(self, seed: int, row: int, stream: int) -> None:
        self._seed = seed & _WORD
        self._row = row
        # typed: numpy would turn a list with a word from 2**63 up into floats and lose its low bits
        key = np.array([self._seed, (row << 8) | stream], dtype=np.uint64)
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def bernoulli(self, probability: float) -> bool:
        """Returns True with the given probability."""
        return float(self._generator.random()) < probability

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

    def top_k_without_replacement(self, log_weights: Tensor, count: int) -> list[int]:
        """Returns distinct indices in order of drawing."""
        return draw_without_replacement(self, log_weights, count)

    def gumbel_argmax(self, scores: Tensor, position: int) -> int:
        """Returns argmax(scores + g); g is evaluated only where it could still win."""
        top = torch.argmax(scores).unsqueeze(0)
        reached = scores[top].double() + keyed_gumbel(self._seed, self._row, position, top)
        support = torch.nonzero(scores > reached - LARGEST_GUMBEL).squeeze(-1)
        if 2 * len(support) > len(scores):
            noise = keyed_gumbel_dense(self._seed, self._row, position, len(scores), scores.device)
            return int(torch.argmax(scores.double() + noise))
        noise = keyed_gumbel(self._seed, self._row, position, support)
        return int(support[torch.argmax(scores[support].double() + noise)])

    def keyed_noise(self, position: int, token_ids: Tensor) -> Tensor:
        """Returns the noise of `gumbel_argmax` for the ids."""
        return keyed_gumbel(self._seed, self._row, position, token_ids)


def draw_without_replacement(source: RandomSource, log_weights: Tensor, count: int) -> list[int]:
    """Returns `count` indices drawn one by one, each drawn weight set to zero (or all there are).

    The same law as Gumbel-top-k in decreasing order of perturbed values (Kool et al., arXiv
    1903.06059), written as categorical draws: no dense noise, and a test can enumerate it.
    """
    weights = torch.softmax(log_weights, dim=-1)
    drawn: list[int] = []
    for _ in range(min(count, int((weights > 0).sum()))):
        index = source.categorical(weights)
        drawn.append(index)
        weights[index] = 0.0
    return drawn


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
