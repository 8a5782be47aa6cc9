"""How far a drafter's law is from the target's, where only the target's likeliest tokens are known.

The laws are compared over the known tokens and one bucket for all others. What the drafter cannot
guess at all is taken out of the target's law, and the position weighs that much less.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.training.log_probs_at import log_probs_at

FORWARD_KL = "forward_kl"
OBJECTIVES = (FORWARD_KL, "reverse_kl", "total_variation")
_LEAST = 1e-6  # of the bucket's chance: its logarithm stays finite


class Divergence(NamedTuple):
    """A divergence, and what it means for drafting.

    Attributes:
        value: ``[]``, the mean over positions.
        acceptance: chance that a token drawn at temperature 1 is accepted; the bucket counts as one
            token, so it is a little too high.
        agreement: share of positions where both name the same token first.
    """

    value: Tensor
    acceptance: float
    agreement: float


def divergence(
    logits: Tensor, ids: Tensor, log_probs: Tensor, objective: str = FORWARD_KL
) -> Divergence:
    """Returns how far laws given by logits are from the target's.

    Source: DistillSpec (arXiv 2310.08461), section 3; the bucket is ours.

    Args:
        logits: ``[n, W]`` of the drafter, over its own vocabulary.
        ids: ``[n, k]`` int64 places in that vocabulary of the target's likeliest tokens, best
            first; -1 for one that the drafter cannot guess.
        log_probs: ``[n, k]`` float32, the target's log-probabilities of them.
        objective: one of `OBJECTIVES`.
    """
    known = ids >= 0
    places = ids.clamp_min(0)
    p = log_probs.exp()
    rest = (1 - p.sum(dim=1)).clamp_min(0)
    p = p * known
    weight = p.sum(dim=1) + rest
    scale = weight.clamp_min(_LEAST).unsqueeze(1)
    p = torch.cat([p, rest.unsqueeze(1)], dim=1) / scale

    log_q, best = log_probs_at(logits, places)
    q = log_q.exp() * known
    log_rest = torch.log1p(-q.sum(dim=1, keepdim=True).clamp(max=1 - _LEAST))
    log_q = torch.cat([log_q * known, log_rest], dim=1)
    q = torch.cat([q, log_rest.exp()], dim=1)
    counted = torch.cat([known, known.new_ones(len(known), 1)], dim=1)
    log_p = p.clamp_min(_LEAST).log() * counted

    if objective == FORWARD_KL:
        values = (p * (log_p - log_q)).sum(dim=1)
    elif objective == "reverse_kl":
        values = (q * (log_q - log_p)).sum(dim=1)
    else:
        values = 0.5 * (p - q).abs().sum(dim=1)
    total = weight.sum().clamp_min(_LEAST)
    with torch.no_grad():
        acceptance = float((torch.minimum(p, q).sum(dim=1) * weight).sum() / total)
        agreement = float((best == ids[:, 0]).float().mean())
    return Divergence((values * weight).sum() / total, acceptance, agreement)
