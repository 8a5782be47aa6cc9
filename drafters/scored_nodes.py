"""What the target said of every node of a step, for drafters that keep its guesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.top_k_rows import top_k_rows
from specdec.types import StepOutcome

_MOST_COPIED = 1 << 20  # entries; 4 MB of float32, what fits in the caches of one core


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
        """Returns the nodes of all rows, with the k likeliest tokens behind each."""
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
        rows = [outcome.logits[: len(outcome.tree)] for outcome in outcomes]
        # one selection for all small trees: its launches cost more than the copy
        if len(rows) > 1 and sum(map(Tensor.numel, rows)) <= _MOST_COPIED:
            rows = [torch.cat(rows)]
        top = [top_k_rows(one, k) for one in rows]
        logits, ids = top[0] if len(top) == 1 else map(torch.cat, zip(*top, strict=True))
        return cls(tokens, parents, visited, emitted, order, ids.cpu(), logits.cpu())

    def tokens_above(self, roots: Sequence[int]) -> list[int]:
        """Returns the token above each of the n nodes; `roots` are those above the roots."""
        tokens, above = self.tokens, iter(roots)
        return [next(above) if parent < 0 else tokens[parent] for parent in self.parents]
