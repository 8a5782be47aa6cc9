"""One law out of several drafters, each trusted as far as it has been right."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.learning import LearnedState, LearningDrafter
from specdec.drafters.listed_law import guesses_of, rows_of
from specdec.errors import ConfigError, StateError
from specdec.kernels.drafting import MOST_MIXED
from specdec.trees.heap import is_listed
from specdec.trees.native_law import NativeLaw, NativeTrust
from specdec.types import (
    DraftContext,
    Drafter,
    DrafterNeeds,
    DraftLaw,
    Guesses,
    LawRows,
    ListedLaw,
    PromptRows,
    StepOutcome,
    TargetInfo,
)

_SHORTLIST = 16  # tokens of a source's row that are looked at
_SLOWEST_RATE = 0.02  # by which an outcome moves the trust; the first ones move it faster
_PRIOR_OUTCOMES = 3.0
# how sure a source must be of its first token to come into the next class
_CLASSES = [0.15, 0.35, 0.6, 0.85]


class Hybrid(LearningDrafter):
    """Mixes the laws of several drafters: p(token) = sum_i w_i p_i(token).

    Sources keep their own tables and paths, and all of them learn from every step. The weights
    depend on how sure each source is of its first token (five classes, and none without a row), and
    follow the text by online expectation maximisation: w_i moves towards the share that source i
    had in the probability of the token that came. A retrieval source that has a long match is
    trusted when long matches have been right, and leaves the tree to the others otherwise.

    Source: ours. SAM-Decoding and RACER (arXiv 2604.14885) combine retrieval and token recycling
    by a threshold on the match length, or retrieval first and the rest of the nodes to recycling.

    Args:
        sources: drafters, at least one; names must differ, as the weights are saved under them.
    """

    name = "hybrid"

    def __init__(self, sources: Sequence[Drafter]) -> None:
        names = [source.name for source in sources]
        if not sources or len(set(names)) < len(names) or len(names) > MOST_MIXED:
            raise ConfigError(
                f"a hybrid needs 1 to {MOST_MIXED} sources with different names, got {names}"
            )
        self.sources = tuple(sources)
        self.needs = self._united_needs()
        self._believe(_Trust.nothing(len(sources)))
        self._laws: dict[int, _MixedLaw | NativeLaw] = {}

    def attach(self, target: TargetInfo) -> None:
        """Attaches the sources; some know only now what they read of the target.

        Raises:
            ConfigError: if several want slots behind the nodes of a pass.
        """
        for source in self.sources:
            source.attach(target)
        self.needs = self._united_needs()

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Begins a row in every source, with as many guesses a position as it asked for."""
        for source in self.sources:
            count = source.needs.prompt_top_k
            own = None
            wants = source.needs
            asks = count or wants.layers or wants.probes is not None
            if prompt_rows is not None and asks:
                own = prompt_rows._replace(
                    ids=prompt_rows.ids[:, :count],
                    logits=prompt_rows.logits[:, :count],
                    features=self._features_for(source, prompt_rows.features),
                )
            source.start(row, prompt, own)

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns the mixed law behind the row's text."""
        laws = [source.law(context) for source in self.sources]
        listed = [law for law in laws if is_listed(law)]
        native = [law for law in laws if isinstance(law, NativeLaw)]
        law: _MixedLaw | NativeLaw
        if len(native) == len(laws):
            law = self._native_trust().mixture(native)
        elif len(listed) == len(laws):
            law = _ListedMixture(self, listed)
        else:
            law = _MixedLaw(self, laws)
        self._laws[context.row] = law
        return law

    def expand(self, requests: Sequence[tuple[DraftLaw, Sequence[int]]]) -> list[LawRows]:
        """Asks each source for all rows at once, then mixes."""
        if all(isinstance(law, NativeLaw) for law, _ in requests):
            return [law.rows(handles) for law, handles in requests]
        own = [(cast("_MixedLaw", law), handles) for law, handles in requests]
        answers = [
            source.expand([(law.laws[i], law.of_source(i, handles)) for law, handles in own])
            for i, source in enumerate(self.sources)
        ]
        by_request = zip(*answers, strict=True)
        return [
            law.mixed(handles, rows) for (law, handles), rows in zip(own, by_request, strict=True)
        ]

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Moves the weights towards the sources that were right; then the sources learn."""
        for outcome in outcomes:
            law = self._laws.pop(outcome.row, None)
            handles = outcome.tree.handles
            if law is not None and handles is not None:
                law.learn([handles[node] for node in (0, *outcome.path)], outcome.emitted)
        for source in self.sources:
            own = outcomes
            if self.needs.layers:
                own = [
                    replace(outcome, features=self._features_for(source, outcome.features))
                    for outcome in outcomes
                ]
            source.observe(own)

    def stop(self, row: int) -> None:
        """Ends the row in every source."""
        self._laws.pop(row, None)
        for source in self.sources:
            source.stop(row)

    @property
    def nbytes(self) -> int:
        """Bytes of the sources' tables when they are full, as far as they tell."""
        return sum(getattr(source, "nbytes", 0) for source in self.sources)

    def reset(self) -> None:
        """Forgets the weights and everything the sources have learned."""
        self._believe(_Trust.nothing(len(self.sources)))
        self._laws.clear()
        for source in self.sources:
            source.reset()

    def state(self) -> LearnedState:
        """Returns the weights and the states of the sources that learn."""
        weights, outcomes = self._trust
        known = outcomes[..., None] > 0
        weights = np.where(known, weights, 1.0 / len(self.sources))
        own = LearnedState({"weights": weights, "outcomes": outcomes.copy()})
        return LearnedState.joined({"mixture": own} | {s.name: s.state() for s in self._learners})

    def restore(self, state: LearnedState) -> None:
        """Takes over weights and sources; the sources must be the same."""
        learning = self._learners
        names = {"mixture", *(source.name for source in learning)}
        if set(state.facts) != names:
            raise StateError(f"expected the sources {sorted(names)}, got {sorted(state.facts)}")
        own = state.part("mixture")
        fresh = _Trust.nothing(len(self.sources))
        weights = own.array("weights", fresh.weights.shape, np.float64)
        outcomes = own.array("outcomes", fresh.outcomes.shape, np.float64)
        if not np.allclose(weights.sum(axis=-1), 1.0) or weights.min() < 0:
            raise StateError("the weights of a mixture must be shares that sum to one")
        if not outcomes.min() >= 0:
            raise StateError("the outcomes of a mixture must be counts")
        before = {source.name: source.state() for source in learning}
        try:
            for source in learning:
                source.restore(state.part(source.name))
        except StateError:
            for source in learning:
                source.restore(before[source.name])
            raise
        self._believe(_Trust(np.array(weights), np.array(outcomes)))

    def mix(self, rows: Sequence[Guesses]) -> _Mixture:
        """Returns the mixture of what the sources guess at one node."""
        # 0 where a source has no row, else 1 + the class of its first chance
        classes = tuple(
            [1 + bisect_left(_CLASSES, chances[0]) if chances else 0 for _, chances in rows]
        )
        weights = self._trust.of(classes)
        mixed: dict[int, float] = {}
        for weight, (tokens, chances) in zip(weights, rows, strict=True):
            own = zip(tokens[:_SHORTLIST], chances, strict=False)
            if mixed:
                known = mixed.get
                for token, chance in own:
                    mixed[token] = known(token, 0.0) + weight * chance
            else:
                mixed = {token: weight * chance for token, chance in own}
        ranked = sorted(mixed, key=mixed.__getitem__, reverse=True)
        guesses = Guesses(ranked, list(map(mixed.__getitem__, ranked)))
        return _Mixture(guesses, rows, weights, classes)

    def learn(self, mixture: _Mixture, token: int) -> None:
        """Moves the weights of a mixture towards the sources that guessed a token."""
        own = zip(mixture.weights, mixture.rows, strict=True)
        shares = [weight * _chance_of(token, row) for weight, row in own]
        total = sum(shares)
        if total:
            self._trust.move(mixture.classes, [share / total for share in shares])

    def _believe(self, trust: _Trust) -> None:
        self._trust = trust
        self._native: NativeTrust | None = None  # the same for C code, once it is asked

    def _native_trust(self) -> NativeTrust:
        if self._native is None:
            self._native = NativeTrust(*self._trust)
        return self._native

    def _united_needs(self) -> DrafterNeeds:
        needs = [source.needs for source in self.sources]
        layers = dict.fromkeys(layer for own in needs for layer in own.layers)
        probing = [source for source in self.sources if source.needs.probes is not None]
        if len(probing) > 1:
            raise ConfigError(
                "one source of a hybrid can have slots behind the nodes of a pass, not "
                + ", ".join(source.name for source in probing)
            )
        return DrafterNeeds(
            max(own.prompt_top_k for own in needs),
            tuple(layers),
            max(own.node_top_k for own in needs),
            probing[0].needs.probes if probing else None,
            every_step=any(own.every_step for own in needs),
        )

    def _features_for(self, source: Drafter, features: Tensor | None) -> Tensor | None:
        """Returns the columns ``[n, F]`` of the layers that a source asked for, in its order."""
        layers, wanted = self.needs.layers, source.needs.layers
        if features is None or not wanted:
            return None
        if wanted == layers:
            return features
        parts = dict(zip(layers, features.chunk(len(layers), dim=-1), strict=True))
        return torch.cat([parts[layer] for layer in wanted], dim=-1)

    @property
    def _learners(self) -> list[LearningDrafter]:
        return [source for source in self.sources if isinstance(source, LearningDrafter)]


class _Trust(NamedTuple):
    """The weights of n sources by the class of each, and how many outcomes moved them.

    Attributes:
        weights: ``[classes, ..., n]`` float64; they are equal where no outcome was seen.
        outcomes: ``[classes, ...]`` float64.
    """

    weights: np.ndarray
    outcomes: np.ndarray

    @classmethod
    def nothing(cls, count: int) -> _Trust:
        """Returns that of `count` sources before any outcome; memory is touched when it is used."""
        # without a row, else by the chance of the first token
        shape = (len(_CLASSES) + 2,) * count
        return cls(np.zeros((*shape, count)), np.zeros(shape))

    def of(self, classes: tuple[int, ...]) -> list[float]:
        """Returns the weights of the sources."""
        if not self.outcomes[classes]:
            self.weights[classes] = 1.0 / len(classes)
        weights: list[float] = self.weights[classes].tolist()
        return weights

    def move(self, classes: tuple[int, ...], shares: list[float]) -> None:
        """Moves the weights towards the sources' shares in what was right."""
        weights = self.of(classes)
        self.outcomes[classes] += 1
        rate = max(_SLOWEST_RATE, 1 / (float(self.outcomes[classes]) + _PRIOR_OUTCOMES))
        pairs = zip(weights, shares, strict=True)
        self.weights[classes] = [weight + rate * (share - weight) for weight, share in pairs]


class _Mixture(NamedTuple):
    """The guesses at one handle, and what of each source they were made from."""

    guesses: Guesses
    rows: Sequence[Guesses]
    weights: list[float]
    classes: tuple[int, ...]


class _MixedLaw:
    """A handle stands for one handle of each source's law."""

    def __init__(self, drafter: Hybrid, laws: Sequence[DraftLaw]) -> None:
        self._drafter = drafter
        self.laws = laws
        self._extends = [law.extend for law in laws]
        self._handles = [[0] * len(laws)]
        self.mixtures: dict[int, _Mixture] = {}

    def extend(self, parent: int, token: int) -> int:
        parents = self._handles[parent]
        self._handles.append(
            [extend(own, token) for extend, own in zip(self._extends, parents, strict=True)]
        )
        return len(self._handles) - 1

    def of_source(self, index: int, handles: Sequence[int]) -> list[int]:
        """Returns what a source calls these handles."""
        return [self._handles[handle][index] for handle in handles]

    def mixture(self, handle: int) -> _Mixture | None:
        """Returns what the law said at a handle; None if it was not asked."""
        return self.mixtures.get(handle)

    def learn(self, handles: Sequence[int], tokens: Sequence[int]) -> None:
        """Moves the weights, now that tokens came at the handles of a path."""
        for handle, token in zip(handles, tokens, strict=False):
            mixture = self.mixture(handle)
            if mixture is not None:
                self._drafter.learn(mixture, token)

    def rows(self, handles: Sequence[int]) -> LawRows:
        own = [law.rows(self.of_source(i, handles)) for i, law in enumerate(self.laws)]
        return self.mixed(handles, own)

    def mixed(self, handles: Sequence[int], rows: Sequence[LawRows]) -> LawRows:
        """Returns the mixture of the sources' rows, likely first, and notes how it came about."""
        by_handle = zip(*(guesses_of(row, _SHORTLIST) for row in rows), strict=True)
        for handle, own in zip(handles, by_handle, strict=True):
            self.mixtures[handle] = self._drafter.mix(own)
        return rows_of([self.mixtures[handle].guesses for handle in handles])


class _ListedMixture(_MixedLaw):
    """A mixture of laws that are all looked up node by node."""

    def __init__(self, drafter: Hybrid, laws: Sequence[ListedLaw]) -> None:
        super().__init__(drafter, laws)
        self._listed = laws

    def guesses(self, handle: int) -> Guesses:
        return self.mixture(handle).guesses

    def mixture(self, handle: int) -> _Mixture:
        """Returns what the law says at a handle, also where no tree needed to know."""
        mixture = self.mixtures.get(handle)
        if mixture is None:
            own = self._handles[handle]
            rows = [law.guesses(place) for law, place in zip(self._listed, own, strict=True)]
            mixture = self.mixtures[handle] = self._drafter.mix(rows)
        return mixture

    def bound(self, handle: int) -> float:
        """Returns the largest bound of the sources: no mixture is surer than the surest of them."""
        own = self._handles[handle]
        return max([law.bound(place) for law, place in zip(self._listed, own, strict=True)])


def _chance_of(token: int, row: Guesses) -> float:
    known = row.tokens[:_SHORTLIST]
    return row.chances[known.index(token)] if token in known else 0.0
