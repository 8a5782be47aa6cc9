"""Best-first trees that look at the verifier's own noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from specdec.errors import ConfigError
from specdec.random import RandomSource, SeededRandom
from specdec.trees.base import BasePolicy
from specdec.trees.best_first import (
    Candidates,
    grow_best_first,
    grow_likeliest,
    most_probable,
)
from specdec.trees.heap import HeapLimits, grow_by_heap, is_listed
from specdec.trees.native_law import KeyedNoise, NativeLaw
from specdec.trees.tree import DraftTree
from specdec.types import (
    Budget,
    DraftLaw,
    Draw,
    GrowPlan,
    Guesses,
    LawRows,
    ListedLaw,
    Root,
    StepOutcome,
)

_LEAST_SQUARE = 1e-2  # a long time of being right must not make the next step a jump
_SHORTLIST = 32  # candidates of a law that get noise; the others cannot win often
_START = (0.8, 0.8, 0.8, 0.2)  # s, c, r, e; s = c ranks rightly when the draft law is the target's
_RATE = 0.1  # of the online fit
_MEMORY = 0.999  # the fit forgets, as the text and the temperature change
_LEAST_REST = 1e-4  # a law's mass beyond the candidates is never quite nothing


class _Candidates(NamedTuple):
    """What the estimate of one node's children was made from."""

    ids: Sequence[int] | np.ndarray  # [k]
    log_probs: Sequence[float] | np.ndarray  # [k]
    noise: Sequence[float] | np.ndarray  # [k]


class CoupledBestFirst(BasePolicy):
    """Allocates nodes by the chance that each is the target's choice, given the noise g_t.

    The `coupled` verifier emits argmax(log p + g) at every node, with noise that is known before
    the target is asked. The chance that candidate i is that argmax is estimated as

        exp(s log q_i + c g_i) / (sum_j exp(s log q_j + c g_j) + exp(r log rest + e)),

    rest being the draft law's mass outside the candidates, and the nodes of the largest products
    along their paths are taken. s, c, r and e follow the outcomes: a step of AdaGrad on the log
    loss for each emitted token. Only `coupled` stays exact when the tree has seen its noise. A
    greedy target has no noise: then the tree is that of `best_first`.

    Source: ours; drafting with the target's own noise as in Daliri et al. (arXiv 2408.07978).

    Args:
        max_branching: the most children a node may get.
        max_depth: the deepest level.

    Raises:
        ConfigError: if one is less than 1.
    """

    name = "coupled_best_first"
    draws = frozenset({Draw.COUPLED})

    def __init__(self, max_branching: int = 16, max_depth: int = 16) -> None:
        if max_branching < 1 or max_depth < 1:
            raise ConfigError(
                "max_branching and max_depth must be at least 1, got "
                f"{max_branching} and {max_depth}"
            )
        self._max_branching = max_branching
        self._max_depth = max_depth
        self.weights = np.array(_START)
        self.squares = np.ones(4)
        # the candidates of every node expanded for a tree that is still out, by the node's handle,
        # or the law that has noted them
        self._out: WeakKeyDictionary[DraftTree, dict[int, _Candidates] | NativeLaw] = (
            WeakKeyDictionary()
        )

    @property
    def limits(self) -> HeapLimits:
        """Of its trees for a greedy target."""
        return HeapLimits(self._max_branching, self._max_depth, Draw.COUPLED)

    def grow(self, law: DraftLaw, root: Root, budget: Budget, random: RandomSource) -> GrowPlan:
        """Grows one tree; see `specdec.types.TreePolicy.grow`."""
        if root.greedy:
            return (
                yield from grow_likeliest(
                    law,
                    root,
                    budget,
                    max_branching=self._max_branching,
                    max_depth=self._max_depth,
                    draw=Draw.COUPLED,
                )
            )
        if isinstance(law, NativeLaw) and isinstance(random, SeededRandom):
            tree = law.grow(
                root,
                budget,
                max_branching=self._max_branching,
                max_depth=self._max_depth,
                draw=Draw.COUPLED,
                noise=KeyedNoise(random.seed, random.row, self.weights),
            )
            self._out[tree] = law
            return tree
        noted: dict[int, _Candidates] = {}
        if is_listed(law):
            tree = self._grow_listed(law, root, budget, random, noted)
        else:
            tree = yield from self._grow_levels(law, root, budget, random, noted)
        self._out[tree] = noted
        return tree

    def _grow_levels(
        self,
        law: DraftLaw,
        root: Root,
        budget: Budget,
        random: RandomSource,
        noted: dict[int, _Candidates],
    ) -> GrowPlan:
        """Grows a tree and notes the candidates of every handle that was expanded."""

        def weigh(rows: LawRows, handles: Sequence[int], depth: int) -> Candidates:
            ids, log_probs = most_probable(rows, _SHORTLIST)
            tokens = torch.from_numpy(ids.clip(min=0)).flatten()
            drawn = random.keyed_noise(root.position + depth, tokens).reshape(ids.shape)
            noise = drawn.numpy(force=True)
            for handle, *own in zip(handles, ids, log_probs, noise, strict=True):
                noted[handle] = _Candidates(*own)
            log_chances = _log_softmax(_terms(log_probs, noise) @ self.weights)[:, :-1]
            order = np.argsort(-log_chances, axis=1, kind="stable")
            order = order[:, : min(self._max_branching, budget.nodes)]
            ranked = np.take_along_axis(log_chances, order, axis=1)
            return np.take_along_axis(ids, order, axis=1), ranked.astype(np.float32)

        return (
            yield from grow_best_first(
                law, root, budget, weigh, max_depth=self._max_depth, draw=Draw.COUPLED
            )
        )

    def _grow_listed(
        self,
        law: ListedLaw,
        root: Root,
        budget: Budget,
        random: RandomSource,
        noted: dict[int, _Candidates],
    ) -> DraftTree:
        """Does the same node by node, in plain lists: a table's row is short."""
        of_law, of_noise, of_rest, constant = self.weights.tolist()

        def weigh(handle: int, depth: int) -> Guesses:
            tokens, chances = law.guesses(handle)
            if not tokens:
                return Guesses((), ())
            tokens, chances = tokens[:_SHORTLIST], chances[:_SHORTLIST]
            logs = list(map(math.log, chances))
            noise = random.keyed_noise(root.position + depth, torch.tensor(tokens)).tolist()
            noted[handle] = _Candidates(tokens, logs, noise)
            rest = math.log(max(1.0 - sum(chances), _LEAST_REST))
            scores = [of_law * q + of_noise * g for q, g in zip(logs, noise, strict=True)]
            none = of_rest * rest + constant
            highest = max(none, *scores)
            shares = [math.exp(score - highest) for score in scores]
            total = sum(shares) + math.exp(none - highest)
            order = sorted(range(len(tokens)), key=shares.__getitem__, reverse=True)
            order = [place for place in order[: self._max_branching] if shares[place]]
            return Guesses([tokens[i] for i in order], [shares[i] / total for i in order])

        return grow_by_heap(
            law,
            root,
            budget,
            max_branching=self._max_branching,
            max_depth=self._max_depth,
            draw=Draw.COUPLED,
            weigh=weigh,
        )

    def observe(self, outcome: StepOutcome) -> None:
        """Fits the estimate to what the target chose at the nodes it came by."""
        noted = self._out.pop(outcome.tree.grown or outcome.tree, None)
        if noted is None or outcome.tree.handles is None:
            return
        handles = [outcome.tree.handles[node] for node in (0, *outcome.path)]
        if isinstance(noted, NativeLaw):
            noted.fit(handles, outcome.emitted, self.weights, self.squares)
            return
        for handle, token in zip(handles, outcome.emitted, strict=False):
            candidates = noted.get(handle)
            if candidates is not None:
                self._learn(candidates, token)

    def _learn(self, candidates: _Candidates, token: int) -> None:
        terms = _terms(np.asarray(candidates.log_probs), np.asarray(candidates.noise))
        hit = np.append(np.asarray(candidates.ids) == token, False)
        hit[-1] = not hit.any()
        errors = np.exp(_log_softmax(terms @ self.weights)) - hit
        # a candidate that is padding has chance 0 and terms that must not enter a product
        gradient = errors @ np.where(np.isfinite(terms), terms, 0.0)
        self.squares[:] = np.maximum(_MEMORY * self.squares, _LEAST_SQUARE) + gradient**2
        self.weights -= _RATE * gradient / np.sqrt(self.squares)
        np.maximum(self.weights[:3], 0.0, out=self.weights[:3])


def _terms(log_probs: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Returns what the weights multiply, ``[..., k + 1, 4]``; the last row is "none of these"."""
    *shape, count = log_probs.shape
    terms = np.zeros((*shape, count + 1, 4))
    terms[..., :-1, 0] = log_probs
    terms[..., :-1, 1] = noise
    rest = 1.0 - np.exp(terms[..., :-1, 0]).sum(axis=-1)
    terms[..., -1, 2] = np.log(np.maximum(rest, _LEAST_REST))
    terms[..., -1, 3] = 1.0
    return terms


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    highest = scores.max(axis=-1, keepdims=True)
    shifted = scores - highest
    logs: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs
