"""Mixtures of draft laws, and how far each of these is trusted."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from specdec.drafters.learning import LearnedState
from specdec.drafters.listed_law import guesses_of, rows_of
from specdec.drafters.native_mixture import NativeTrust
from specdec.errors import StateError
from specdec.trees.heap import is_listed
from specdec.trees.native_law import NativeLaw
from specdec.types import DraftLaw, Guesses, LawRows, ListedLaw

_SHORTLIST = 16  # tokens of a source's row that are looked at
_SLOWEST_RATE = 0.02  # by which an outcome moves the trust; the first ones move it faster
_PRIOR_OUTCOMES = 3.0
# how sure a source must be of its first token to come into the next class
_CLASSES = [0.15, 0.35, 0.6, 0.85]


class Trust:
    """The weights of n sources by how sure each is of its first token.

    Args:
        weights: ``[classes, ..., n]`` float64; not looked at where no outcome was seen, as there
            they are equal. A source is of class 0 without a row, else by its first chance.
        outcomes: ``[classes, ...]`` float64, how many moved the weights.
    """

    def __init__(self, weights: np.ndarray, outcomes: np.ndarray) -> None:
        self._weights, self._outcomes = weights, outcomes
        self._native: NativeTrust | None = None

    @classmethod
    def nothing(cls, count: int) -> Trust:
        """Returns that of `count` sources before any outcome; memory is touched when it is used."""
        shape = (len(_CLASSES) + 2,) * count
        return cls(np.zeros((*shape, count)), np.zeros(shape))

    def law(self, laws: Sequence[DraftLaw]) -> MixedLaw | NativeLaw:
        """Returns the mixture of the sources' laws, each at its root."""
        native = [law for law in laws if isinstance(law, NativeLaw)]
        listed = [law for law in laws if is_listed(law)]
        if len(native) == len(laws):
            return self.native.mixture(native)
        if len(listed) == len(laws):
            return ListedMixture(self, listed)
        return MixedLaw(self, laws)

    @property
    def native(self) -> NativeTrust:
        """The same weights for C code."""
        if self._native is None:
            self._native = NativeTrust(self._weights, self._outcomes)
        return self._native

    def mix(self, rows: Sequence[Guesses]) -> Mixture:
        """Returns the mixture of what the sources guess at one node."""
        # 0 where a source has no row, else 1 + the class of its first chance
        classes = tuple(
            [1 + bisect_left(_CLASSES, chances[0]) if chances else 0 for _, chances in rows]
        )
        weights = self._of(classes)
        mixed: dict[int, float] = {}
        for weight, (tokens, chances) in zip(weights, rows, strict=True):
            for token, chance in zip(tokens[:_SHORTLIST], chances, strict=False):
                mixed[token] = mixed.get(token, 0.0) + weight * chance
        ranked = sorted(mixed, key=mixed.__getitem__, reverse=True)
        while ranked and not mixed[ranked[-1]]:  # of a source that is not trusted at all
            ranked.pop()
        guesses = Guesses(ranked, list(map(mixed.__getitem__, ranked)))
        return Mixture(guesses, rows, weights, classes)

    def learn(self, mixture: Mixture, token: int) -> None:
        """Moves the weights towards the sources' shares in a token that came."""
        pairs = zip(mixture.weights, mixture.rows, strict=True)
        parts = [weight * _chance_of(token, row) for weight, row in pairs]
        total = sum(parts)
        if not total:
            return
        weights = self._of(mixture.classes)
        self._outcomes[mixture.classes] += 1
        count = float(self._outcomes[mixture.classes])
        rate = max(_SLOWEST_RATE, 1 / (count + _PRIOR_OUTCOMES))
        self._weights[mixture.classes] = [
            weight + rate * (part / total - weight)
            for weight, part in zip(weights, parts, strict=True)
        ]

    def _of(self, classes: tuple[int, ...]) -> list[float]:
        if not self._outcomes[classes]:
            return [1.0 / len(classes)] * len(classes)
        weights: list[float] = self._weights[classes].tolist()
        return weights

    def state(self) -> LearnedState:
        """Returns the weights and outcomes."""
        known, equal = self._outcomes[..., None] > 0, 1.0 / self._weights.shape[-1]
        weights = np.where(known, self._weights, equal)
        return LearnedState({"weights": weights, "outcomes": self._outcomes.copy()})

    @classmethod
    def restored(cls, state: LearnedState, count: int) -> Trust:
        """Returns that of a state of `count` sources. Raises StateError if it does not fit."""
        shape = (len(_CLASSES) + 2,) * count
        weights = state.array("weights", (*shape, count), np.float64)
        outcomes = state.array("outcomes", shape, np.float64)
        if not np.allclose(weights.sum(axis=-1), 1.0) or weights.min() < 0:
            raise StateError("the weights of a mixture must be shares that sum to one")
        if not outcomes.min() >= 0:
            raise StateError("the outcomes of a mixture must be counts")
        return cls(np.array(weights), np.array(outcomes))


class Mixture(NamedTuple):
    """The guesses at one handle, and what of each source they were made from."""

    guesses: Guesses
    rows: Sequence[Guesses]
    weights: list[float]
    classes: tuple[int, ...]


class MixedLaw:
    """A handle stands for one handle of each source's law."""

    def __init__(self, trust: Trust, laws: Sequence[DraftLaw]) -> None:
        self._trust = trust
        self.laws = laws
        self._extends = [law.extend for law in laws]
        self._handles = [[0] * len(laws)]
        self.mixtures: dict[int, Mixture] = {}

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle for `parent` followed by `token`."""
        parents = self._handles[parent]
        self._handles.append(
            [extend(own, token) for extend, own in zip(self._extends, parents, strict=True)]
        )
        return len(self._handles) - 1

    def of_source(self, index: int, handles: Sequence[int]) -> list[int]:
        """Returns what a source calls these handles."""
        return [self._handles[handle][index] for handle in handles]

    def mixture(self, handle: int) -> Mixture | None:
        """Returns what the law said at a handle; None if it was not asked."""
        return self.mixtures.get(handle)

    def learn(self, handles: Sequence[int], tokens: Sequence[int]) -> None:
        """Moves the weights, now that tokens came at the handles of a path."""
        for handle, token in zip(handles, tokens, strict=False):
            mixture = self.mixture(handle)
            if mixture is not None:
                self._trust.learn(mixture, token)

    def rows(self, handles: Sequence[int]) -> LawRows:
        """Returns the mixture at each handle, of laws that answer by themselves."""
        own = [law.rows(self.of_source(i, handles)) for i, law in enumerate(self.laws)]
        return self.mixed(handles, own)

    def mixed(self, handles: Sequence[int], rows: Sequence[LawRows]) -> LawRows:
        """Returns the mixture of the sources' rows, likely first, and notes how it came about."""
        by_handle = zip(*(guesses_of(row, _SHORTLIST) for row in rows), strict=True)
        for handle, own in zip(handles, by_handle, strict=True):
            self.mixtures[handle] = self._trust.mix(own)
        return rows_of([self.mixtures[handle].guesses for handle in handles])


class ListedMixture(MixedLaw):
    """A mixture of laws that are all looked up node by node."""

    def __init__(self, trust: Trust, laws: Sequence[ListedLaw]) -> None:
        super().__init__(trust, laws)
        self._listed = laws

    def guesses(self, handle: int) -> Guesses:
        """Returns what may follow a handle."""
        return self.mixture(handle).guesses

    def mixture(self, handle: int) -> Mixture:
        """Returns what the law says at a handle, also where no tree needed to know."""
        mixture = self.mixtures.get(handle)
        if mixture is None:
            own = self._handles[handle]
            rows = [law.guesses(place) for law, place in zip(self._listed, own, strict=True)]
            mixture = self.mixtures[handle] = self._trust.mix(rows)
        return mixture

    def bound(self, handle: int) -> float:
        """Returns the largest bound of the sources: no mixture is surer than the surest of them."""
        own = self._handles[handle]
        return max([law.bound(place) for law, place in zip(self._listed, own, strict=True)])


def _chance_of(token: int, row: Guesses) -> float:
    known = row.tokens[:_SHORTLIST]
    return row.chances[known.index(token)] if token in known else 0.0
