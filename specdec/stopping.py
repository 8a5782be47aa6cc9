"""Stopping criteria, asked once for every committed token of a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from specdec.sampling import Prefix


class RowStopper:
    """Decides after which token a row ends.

    The two criteria that every call has, length and end-of-sequence ids, are read off once and
    compared as integers; all others are called as `generate` calls them, on one row.

    Args:
        criteria: as `generate` prepared them.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self._others = StoppingCriteriaList()
        self.max_length: int | None = None
        self.eos_token_ids: frozenset[int] = frozenset()
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                shorter = min(self.max_length or criterion.max_length, criterion.max_length)
                self.max_length = shorter
            elif type(criterion) is EosTokenCriteria:
                self.eos_token_ids |= set(criterion.eos_token_id.flatten().tolist())
            else:
                self._others.append(criterion)

    @property
    def asks_others(self) -> bool:
        """Whether anything but length and end-of-sequence ids can end the row."""
        return len(self._others) > 0

    def remaining(self, length: int) -> int | None:
        """Returns how many tokens fit behind `length` ids (padding included), None if unbounded."""
        return None if self.max_length is None else self.max_length - length

    def reason(self, last_token: int, length: int) -> str:
        """Returns why a row ended: "eos", "length", or "criterion" for any other."""
        if last_token in self.eos_token_ids:
            return "eos"
        return "length" if length == self.max_length else "criterion"

    def stops(self, prefix: Prefix, last_token: int, scores: Sequence[Tensor] | None) -> bool:
        """Returns whether the row ends here; to be asked once for each of its tokens.

        Args:
            prefix: the row's ids, the token in question included.
            last_token: that token.
            scores: ``[V]`` each, those of every new token so far; None where they are not kept.
        """
        stop = last_token in self.eos_token_ids or prefix.length == self.max_length
        if self._others:
            given = None if scores is None else tuple(row.unsqueeze(0) for row in scores)
            done: Tensor = self._others(prefix.ids(), given)
            stop = stop or bool(torch.as_tensor(done).any())
        return stop
