"""The exact law of randomised code: every outcome of every draw is taken, one run after another.

The code under test is the production code. It is run again and again; each run repeats the choices
of the one before up to a point, takes the next outcome there, and the first outcome of every draw
behind it. Outcomes of probability zero are never taken. Weights are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from specdec.random import RowStreams, draws_without_replacement

Outcome = TypeVar("Outcome", bound=Hashable)


class MisuseError(AssertionError):
    """The code under test broke a rule that its random source stands for."""


class Tape:
    """The choices of one run: repeated up to a point, new behind it.

    Attributes:
        weight: probability of the choices of this run so far.
    """

    def __init__(self) -> None:
        self.weight = 1.0
        self._laws: list[list[float]] = []
        self._taken: list[int] = []
        self._cursor = 0

    def choose(self, probabilities: list[float]) -> int:
        """Returns the outcome to take at the next draw.

        Raises:
            MisuseError: if the run has gone another way than the run whose choices it repeats.
        """
        if self._cursor == len(self._taken):
            self._laws.append(probabilities)
            self._taken.append(_next_possible(probabilities, 0))
        elif self._laws[self._cursor] != probabilities:
            raise MisuseError("same choices, another draw: something outlives a run or is unseeded")
        index = self._taken[self._cursor]
        self._cursor += 1
        self.weight *= probabilities[index]
        return index

    def advance(self) -> bool:
        """Goes back to the start for the next run; False when every outcome has been taken.

        Raises:
            MisuseError: if the run ended before the choices that it had to repeat.
        """
        if self._cursor < len(self._taken):
            raise MisuseError("same choices, fewer draws: something outlives a run or is unseeded")
        self._cursor, self.weight = 0, 1.0
        while self._taken:
            index = _next_possible(self._laws[-1], self._taken[-1] + 1)
            if index >= 0:
                self._taken[-1] = index
                return True
            self._laws.pop()
            self._taken.pop()
        return False


def _next_possible(probabilities: Sequence[float], start: int) -> int:
    """Returns the first index from `start` with a positive probability, or -1."""
    return next((i for i in range(start, len(probabilities)) if probabilities[i] > 0.0), -1)


class EnumeratingRandom:
    """A `RandomSource` whose draws are branches of a tape; all draws are independent.

    Keyed noise has one value for each position of a row. So the choice at a position is made once
    and remembered; other scores at that position would need its law given the first choice, and no
    correct code asks for that. Draft and verify source of a row share what is remembered.

    Args:
        tape: where choices are recorded.
        noise: what was chosen at each position so far.
    """

    def __init__(self, tape: Tape, noise: dict[int, tuple[Tensor, int]] | None = None) -> None:
        self._tape = tape
        self._noise = {} if noise is None else noise

    def bernoulli(self, probability: float) -> bool:
        """Branches over True and False."""
        if not probability >= 0.0:
            raise MisuseError(f"a probability must not be negative or NaN, got {probability}")
        probability = min(probability, 1.0)
        return self._pick([probability, 1.0 - probability]) == 0

    def categorical(self, weights: Tensor) -> int:
        """Branches over the indices of positive weight."""
        weights = weights.double()
        total = float(weights.sum())
        if not (0.0 < total < float("inf") and bool((weights >= 0).all())):
            raise MisuseError(f"weights must be >= 0 with a positive sum, got {weights.tolist()}")
        return self._pick((weights / total).tolist())

    def uniform(self) -> float:
        """Raises MisuseError: a continuous value cannot be enumerated."""
        raise MisuseError("uniform numbers cannot be enumerated; test by Monte Carlo")

    def without_replacement(self, log_weights: Tensor) -> list[Iterator[tuple[int, float]]]:
        """Branches over one draw after another."""
        return draws_without_replacement(self, log_weights)

    def gumbel_argmax(self, scores: Tensor, position: int) -> int:
        """Branches over softmax(scores), the law of argmax(scores + g), once a position.

        Raises:
            MisuseError: if the noise of a position is used for two different laws.
        """
        if position in self._noise:
            known, choice = self._noise[position]
            if not torch.equal(known, scores):
                raise MisuseError(f"the noise of position {position} was used for another law")
            return choice
        choice = self._tape.choose(torch.softmax(scores.double(), dim=-1).tolist())
        self._noise[position] = (scores.clone(), choice)
        return choice

    def keyed_noise(self, position: int, token_ids: Tensor) -> Tensor:
        """Raises MisuseError: a continuous value cannot be enumerated."""
        raise MisuseError("keyed noise cannot be enumerated; test COUPLED draws with SeededRandom")

    def _pick(self, probabilities: list[float]) -> int:
        return self._tape.choose(probabilities)


class SharedStreamRandom(EnumeratingRandom):
    """A MUTANT for tests: the n-th draw of both sources of a row uses the same uniform number.

    That is what two generators with equal seeds do. Each uniform is known up to an interval: a
    draw is by the inverse of the cumulative law, and leaves the part of the interval that gives
    its outcome; a second draw from the same uniform branches over what overlaps that part.

    Args:
        tape: where choices are recorded.
        uniforms: the interval of each uniform, shared by the two sources.
    """

    def __init__(self, tape: Tape, uniforms: list[tuple[float, float]]) -> None:
        super().__init__(tape)
        self._uniforms = uniforms
        self._count = 0

    def _pick(self, probabilities: list[float]) -> int:
        number = self._count
        self._count += 1
        if number == len(self._uniforms):
            self._uniforms.append((0.0, 1.0))
        low, high = self._uniforms[number]
        sums = list(accumulate(probabilities))
        upper = [1.0 if x == sums[-1] else x for x in sums]  # rounding must not leave a gap below 1
        edges = [(max(low, a), min(high, b)) for a, b in zip([0.0, *upper], upper, strict=False)]
        lengths = [max(b - a, 0.0) for a, b in edges]
        index = self._tape.choose([length / (high - low) for length in lengths])
        self._uniforms[number] = edges[index]
        return index


def independent_streams(tape: Tape) -> RowStreams:
    """Returns the two sources of a row, as different streams."""
    noise: dict[int, tuple[Tensor, int]] = {}
    return RowStreams(EnumeratingRandom(tape, noise), EnumeratingRandom(tape, noise))


def shared_streams(tape: Tape) -> RowStreams:
    """Returns the two sources of a row as one and the same stream: a mutant."""
    uniforms: list[tuple[float, float]] = []
    return RowStreams(SharedStreamRandom(tape, uniforms), SharedStreamRandom(tape, uniforms))


def enumerate_law(
    run: Callable[[RowStreams], Outcome],
    streams: Callable[[Tape], RowStreams] = independent_streams,
) -> dict[Outcome, float]:
    """Returns the probability of each outcome of `run`.

    Args:
        run: the code under test; all its randomness comes from the streams it is given.
        streams: makes the two sources of one run.

    Raises:
        MisuseError: if two runs with the same choices differ, and as the sources say.
    """
    law: dict[Outcome, float] = {}
    tape = Tape()
    while True:
        outcome = run(streams(tape))
        law[outcome] = law.get(outcome, 0.0) + tape.weight
        if not tape.advance():
            return law
