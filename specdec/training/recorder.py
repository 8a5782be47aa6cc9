"""A drafter that guesses nothing and keeps what it is shown: features and laws of a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.drafters.base import BaseDrafter
from specdec.training.corpus import OwnText
from specdec.types import (
    DraftContext,
    DrafterNeeds,
    DraftLaw,
    LawRows,
    PromptRows,
    StepOutcome,
)


class Recorder(BaseDrafter):
    """Rides along with plain decoding, so that training data costs no pass of its own.

    Args:
        layers: whose outputs to keep; empty for none.
        top_k: entries of every law after the answer's first token to keep.
    """

    name = "recorder"

    def __init__(self, layers: Sequence[int], top_k: int) -> None:
        self.needs = DrafterNeeds(layers=tuple(layers), node_top_k=top_k)
        self._top_k = top_k
        self._rows: dict[int, _Record] = {}

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Begins a row with the features of its prompt."""
        features = prompt_rows.features if prompt_rows is not None else None
        if features is None:
            features = torch.empty(len(prompt), 0)
        self._rows[row] = _Record(list(prompt), len(prompt), [_stored(features)])

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns a law that names no token."""
        return _Silence()

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Keeps the features of the roots and the laws behind them."""
        for outcome in outcomes:
            self._keep(outcome)

    def _keep(self, outcome: StepOutcome) -> None:
        record = self._rows[outcome.row]
        if not record.ids:  # the prefill wrote the first token
            record.tokens.append(outcome.tree.token_list[0])
        record.tokens += outcome.emitted
        if outcome.features is not None:
            record.features.append(_stored(outcome.features[:1]))
        assert outcome.top is not None
        normaliser = outcome.logits[:1].float().logsumexp(dim=-1, keepdim=True)
        record.ids.append(outcome.top.ids[:1])
        record.log_probs.append(outcome.top.logits[:1].float() - normaliser.cpu())

    def take(self, row: int, *, greedy: bool) -> OwnText | None:
        """Returns a finished row and forgets it; None if the answer was a single token."""
        record = self._rows.pop(row)
        if not record.ids:
            return None
        length = len(record.tokens)
        features = torch.cat(record.features)
        begin, end = record.prompt_length, length - 1
        top_ids = torch.full((length, self._top_k), -1)
        top_ids[begin:end] = torch.cat(record.ids)
        log_probs = torch.full((length, self._top_k), -torch.inf)
        log_probs[begin:end] = torch.cat(record.log_probs)
        return OwnText(
            torch.tensor(record.tokens),
            record.prompt_length,
            greedy,
            torch.cat([features, features.new_zeros(length - len(features), features.shape[1])]),
            top_ids,
            log_probs,
        )

    def reset(self) -> None:
        """Forgets all rows."""
        self._rows.clear()


class _Record:
    """One row while it is written."""

    def __init__(self, tokens: list[int], prompt_length: int, features: list[Tensor]) -> None:
        self.tokens = tokens
        self.prompt_length = prompt_length
        self.features = features
        self.ids: list[Tensor] = []
        self.log_probs: list[Tensor] = []


class _Silence:
    """The law of a drafter that has no guess."""

    def extend(self, parent: int, token: int) -> int:
        """Returns the root's handle; no node is ever made."""
        return 0

    def rows(self, handles: Sequence[int]) -> LawRows:
        """Returns rows that name no token."""
        return LawRows(torch.full((len(handles), 1), -torch.inf), torch.full((len(handles), 1), -1))


def _stored(features: Tensor) -> Tensor:
    """Returns features as a corpus keeps them; float16 cannot hold what overflows it."""
    limit = torch.finfo(torch.float16).max
    return features.clamp(-limit, limit).to("cpu", torch.float16)
