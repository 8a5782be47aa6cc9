"""What the target said of every node of a step, for drafters that keep its guesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.top_tokens import top_tokens
from specdec.types import StepOutcome


class ScoredNodes(NamedTuple):
    """The nodes of the trees of a step, one tree behind the other.

    Attributes:
        tokens: n, of each node.
        parents: n places of the parents; -1 for the roots.
        visited: m places of the nodes after which a token became text.
        emitted: these tokens.
        order: n places, in which rows of equal keys may overwrite each other: within a tree
            shallow nodes first and the accepted path last, as its context is the truest.
        ids: ``[n, k]`` int64 on the CPU, the target's likeliest tokens behind each node.
        logits: ``[n, k]`` on the CPU, theirs.
    """

    tokens: list[int]
    parents: list[int]
    visited: list[int]
    emitted: list[int]
    order: list[int]
    ids: Tensor
    logits: Tensor

    @classmethod
    def of(cls, outcomes: Sequence[StepOutcome], k: int) -> ScoredNodes:
        """Returns the nodes of all rows, with the k likeliest tokens behind each.

        Args:
            outcomes: of each row. Where they lack k likeliest tokens (`DrafterNeeds.node_top_k`),
                as under a drafter that did not ask for its sources, these are selected here.
            k: entries of a node.
        """
        tokens: list[int] = []
        parents: list[int] = []
        visited: list[int] = []
        emitted: list[int] = []
        order: list[int] = []
        for outcome in outcomes:
            tree, first = outcome.tree, len(tokens)
            tokens += tree.token_list
            parents += [-1, *(first + parent for parent in tree.parent_list[1:])]
            path = [first + node for node in (0, *outcome.path)]
            visited += path[: len(outcome.emitted)]
            emitted += outcome.emitted
            depths, on_path = tree.depth_list, set(path)
            places = range(first, len(tokens))
            order += sorted(places, key=lambda n: (n in on_path, depths[n - first]))
        tops = [own.top for own in outcomes if own.top is not None and own.top.ids.shape[1] >= k]
        if len(tops) < len(outcomes):
            tops = top_tokens([outcome.logits[: len(outcome.tree)] for outcome in outcomes], k)
        ids, logits = _joined([top.ids for top in tops]), _joined([top.logits for top in tops])
        if ids.shape[1] > k:
            ids, logits = ids[:, :k], logits[:, :k]
        return cls(tokens, parents, visited, emitted, order, ids, logits)

    def tokens_above(self, roots: Sequence[int]) -> list[int]:
        """Returns the token above each of the n nodes; `roots` are those above the roots."""
        tokens, above = self.tokens, iter(roots)
        return [next(above) if parent < 0 else tokens[parent] for parent in self.parents]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
