"""What a drafter with a network of its own borrows of the target: embedding and head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specdec.errors import ConfigError, UnsupportedModelError


class TargetParts:
    """The target's embedding, and the rows of its head for a draft vocabulary. Both are frozen.

    Args:
        model: a HuggingFace causal language model.
        vocabulary: ``[Vd]`` int64, the target's ids of the draft vocabulary, each once; None for
            all of them.
        dtype: what embeddings are given in, and the head's rows are kept in.
        embedding_scale: times the embedding.
        multiplier: times the logits.
        softcap: c of c tanh(logits / c); None for none.

    Raises:
        ConfigError: if the draft vocabulary is none of this target.
        UnsupportedModelError: if the model has no plain embedding or head.
    """

    def __init__(
        self,
        model: Any,
        vocabulary: Tensor | None,
        dtype: torch.dtype,
        *,
        embedding_scale: float = 1.0,
        multiplier: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        self._table = model.get_input_embeddings()
        head = model.get_output_embeddings()
        if self._table is None or not isinstance(head, nn.Linear):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no embedding, or no head that is a linear layer; a "
                "drafter cannot share them"
            )
        device = self._table.weight.device
        size = head.weight.shape[0]
        if vocabulary is None:
            vocabulary = torch.arange(size)
        inside = bool(((vocabulary >= 0) & (vocabulary < size)).all())
        if not inside or len(set(vocabulary.tolist())) < len(vocabulary):
            raise ConfigError(
                f"a draft vocabulary must be ids from 0 to {size - 1}, each once; got "
                f"{len(vocabulary)} ids from {int(vocabulary.min())} to {int(vocabulary.max())}"
            )
        self.vocabulary = vocabulary.to(device)
        self.draft_ids = torch.full((size,), -1, device=device)
        self.draft_ids[self.vocabulary] = torch.arange(len(vocabulary), device=device)
        self.head = _rows_of(head, self.vocabulary, dtype)
        self._dtype = dtype
        self._scale, self._multiplier, self._softcap = embedding_scale, multiplier, softcap

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Returns ``[..., D]`` embeddings of the target's ids ``[...]``."""
        embedded: Tensor = self._table(tokens)
        return embedded.to(self._dtype) * self._scale

    def logits(self, states: Tensor) -> Tensor:
        """Returns ``[..., Vd]`` logits over the draft vocabulary."""
        logits: Tensor = self.head(states)
        if self._multiplier != 1.0:
            logits = logits * self._multiplier
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


def _rows_of(head: nn.Linear, vocabulary: Tensor, dtype: torch.dtype) -> nn.Linear:
    """Returns a frozen head of some rows; that of all rows shares the weight."""
    rows = nn.Linear(head.in_features, len(vocabulary), bias=head.bias is not None, device="meta")
    whole = torch.equal(vocabulary.cpu(), torch.arange(len(head.weight)))
    for name in ("weight", "bias")[: 1 if head.bias is None else 2]:
        tensor = getattr(head, name).detach()
        own = tensor if whole else tensor[vocabulary.to(tensor.device)]
        setattr(rows, name, nn.Parameter(own.to(dtype), requires_grad=False))
    return rows


def logit_conventions(model: Any) -> tuple[float, float | None]:
    """Returns what a model multiplies its head's logits with, and the cap it puts on them."""
    config = model.config.get_text_config(decoder=True)
    multiplier = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    multiplier /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return multiplier, None if cap is None else float(cap)
