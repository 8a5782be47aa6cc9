"""Laws that are looked up node by node."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from specdec.trees.best_first import most_probable
from specdec.types import Guesses, LawRows

NOTHING = Guesses((), ())


class ListedLaw:
    """The base of laws that answer in plain lists.

    Subclasses give `extend` and `guesses`, and `bound` where they know it for less.
    """

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle for `parent` followed by `token`."""
        raise NotImplementedError

    def guesses(self, handle: int) -> Guesses:
        """Returns what may follow a handle."""
        raise NotImplementedError

    def bound(self, handle: int) -> float:
        """Returns what no chance among a handle's guesses exceeds."""
        return 1.0

    def rows(self, handles: Sequence[int]) -> LawRows:
        """Returns what may follow each handle, for policies that go level by level."""
        return rows_of([self.guesses(handle) for handle in handles])


def rows_of(guesses: Sequence[Guesses]) -> LawRows:
    """Returns the guesses at n nodes as one sparse law."""
    width = max([1, *(len(own.tokens) for own in guesses)])
    ids: list[int] = []
    log_probs: list[float] = []
    for tokens, chances in guesses:
        padding = width - len(tokens)
        ids += tokens
        ids += [-1] * padding
        log_probs += map(math.log, chances)
        log_probs += [-math.inf] * padding
    return LawRows(
        torch.from_numpy(np.array(log_probs, dtype=np.float32).reshape(-1, width)),
        torch.from_numpy(np.array(ids, dtype=np.int64).reshape(-1, width)),
    )


def at_most_certain(chances: list[float]) -> list[float]:
    """Returns chances scaled down to a sum of one where they are more: together no guess is."""
    total = sum(chances)
    return [chance / total for chance in chances] if total > 1.0 else chances


def guesses_of(rows: LawRows, count: int) -> list[Guesses]:
    """Returns the `count` likeliest guesses of each row of a law."""
    ids, log_probs = most_probable(rows, count)
    chances = np.exp(log_probs, dtype=np.float64)
    possible = (chances > 0).sum(axis=1).tolist()
    return [
        Guesses(tokens[:number], own[:number])
        for tokens, own, number in zip(ids.tolist(), chances.tolist(), possible, strict=True)
    ]
