"""Best-first trees that look at the verifier's own noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from specdec.random import RandomSource
from specdec.trees.base import BasePolicy
from specdec.trees.best_first import (
    Candidates,
    grow_best_first,
    grow_likeliest,
    most_probable,
)
from specdec.trees.tree import DraftTree
from specdec.types import Budget, DraftLaw, Draw, GrowPlan, LawRows, Root, StepOutcome

_LEAST_SQUARE = 1e-2  # a long time of being right must not make the next step a jump
_SHORTLIST = 32  # candidates of a law that get noise; the others cannot win often
_START = (0.8, 0.8, 0.8, 0.2)  # s, c, r, e; s = c ranks rightly when the draft law is the target's
_RATE = 0.1  # of the online fit
_MEMORY = 0.999  # the fit forgets, as the text and the temperature change
_LEAST_REST = 1e-4  # a law's mass beyond the candidates is never quite nothing


class _Candidates(NamedTuple):
    """What the estimate of one node's children was made from."""

    ids: np.ndarray  # [k]
    features: np.ndarray  # [k + 1, 4], the last row is "none of these"


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
    """

    name = "coupled_best_first"
    draws = frozenset({Draw.COUPLED})

    def __init__(self, max_branching: int = 16, max_depth: int = 16) -> None:
        self._max_branching = max_branching
        self._max_depth = max_depth
        self.weights = np.array(_START)
        self._squares = np.ones(4)
        # the candidates of every node expanded for a tree that is still out, by the node's handle
        self._out: WeakKeyDictionary[DraftTree, dict[int, _Candidates]] = WeakKeyDictionary()

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
        noted: dict[int, _Candidates] = {}

        def weigh(rows: LawRows, handles: Sequence[int], depth: int) -> Candidates:
            ids, features = _features(rows, random, root.position + depth)
            for handle, own_ids, own_features in zip(handles, ids, features, strict=True):
                noted[handle] = _Candidates(own_ids, own_features)
            order, log_chances = self._ranked(features, min(self._max_branching, budget.nodes))
            return np.take_along_axis(ids, order, axis=1), log_chances

        tree = yield from grow_best_first(
            law, root, budget, weigh, max_depth=self._max_depth, draw=Draw.COUPLED
        )
        self._out[tree] = noted
        return tree

    def observe(self, outcome: StepOutcome) -> None:
        """Fits the estimate to what the target chose at the nodes it came by."""
        noted = self._out.pop(outcome.tree.grown or outcome.tree, {})
        nodes = [0, *outcome.path]
        for node, token in zip(nodes, outcome.emitted, strict=False):
            candidates = noted.get(outcome.tree.handles[node] if outcome.tree.handles else -1)
            if candidates is not None:
                self._learn(candidates, token)

    def _ranked(self, features: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns places and log-chances ``[n, count]`` of the likeliest candidates."""
        log_chances = _log_softmax(features @ self.weights)[:, :-1]
        order = np.argsort(-log_chances, axis=1, kind="stable")[:, :count]
        ranked = np.take_along_axis(log_chances, order, axis=1)
        return order, ranked.astype(np.float32)

    def _learn(self, candidates: _Candidates, token: int) -> None:
        hit = np.append(candidates.ids == token, False)
        hit[-1] = not hit.any()
        errors = np.exp(_log_softmax(candidates.features @ self.weights)) - hit
        # a candidate that is padding has chance 0 and features that must not enter a product
        gradient = errors @ np.where(np.isfinite(candidates.features), candidates.features, 0.0)
        self._squares = np.maximum(_MEMORY * self._squares, _LEAST_SQUARE) + gradient**2
        self.weights -= _RATE * gradient / np.sqrt(self._squares)
        np.maximum(self.weights[:3], 0.0, out=self.weights[:3])


def _features(rows: LawRows, random: RandomSource, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the candidates' ids ``[n, k]`` and the estimate's terms ``[n, k + 1, 4]``."""
    ids, log_probs = most_probable(rows, _SHORTLIST)
    tokens = torch.from_numpy(ids.clip(min=0)).flatten()
    noise = random.keyed_noise(position, tokens).reshape(ids.shape)
    features = np.zeros((ids.shape[0], ids.shape[1] + 1, 4))
    features[:, :-1, 0] = log_probs
    features[:, :-1, 1] = noise.numpy(force=True)
    rest = 1.0 - np.exp(features[:, :-1, 0]).sum(axis=1)
    features[:, -1, 2] = np.log(np.maximum(rest, _LEAST_REST))
    features[:, -1, 3] = 1.0
    return ids, features


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    highest = scores.max(axis=-1, keepdims=True)
    shifted = scores - highest
    logs: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs
