"""How far a block's laws are from the target's, and what that means for a chain of drafts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.training.log_probs_at import log_probs_at

_LEAST = 1e-6


class Compared(NamedTuple):
    """Draft laws against the target's, for n tokens.

    Attributes:
        cross_entropy: ``[n]`` nats, over the target's likeliest tokens and the rest.
        total_variation: ``[n]``, over the same.
        accepted: ``[n]`` the chance that a draw is accepted, from below; no gradient.
        hits: ``[n]`` bool, whether both have the same most probable token.
    """

    cross_entropy: Tensor
    total_variation: Tensor
    accepted: Tensor
    hits: Tensor


def compare_laws(logits: Tensor, top_ids: Tensor, top_log_probs: Tensor) -> Compared:
    """Compares laws on the target's likeliest tokens; everything else is one more outcome.

    Args:
        logits: ``[n, Vd]`` of the drafter.
        top_ids: ``[n, c]`` int64 draft ids of the target's likeliest tokens, best first; -1 for
            those that cannot be drafted, which count as the rest.
        top_log_probs: ``[n, c]`` of the target.
    """
    named = top_ids >= 0
    log_q, best = log_probs_at(logits, top_ids.clamp(min=0))
    q = log_q.exp() * named
    p = top_log_probs.exp() * named
    rest_q = (1.0 - q.sum(dim=-1)).clamp_min(_LEAST)
    rest_p = (1.0 - p.sum(dim=-1)).clamp_min(0.0)
    cross_entropy = -(p * log_q).sum(dim=-1) - rest_p * rest_q.log()
    total_variation = 0.5 * ((p - q).abs().sum(dim=-1) + (rest_p - rest_q).abs())
    with torch.no_grad():
        accepted = torch.minimum(p, q).sum(dim=-1)
        hits = best == top_ids[:, 0]
    return Compared(cross_entropy, total_variation, accepted, hits)


@torch.no_grad()
def chain_metrics(
    compared: Compared, wanted: Tensor, supervised: Tensor, greedy: Tensor
) -> dict[str, float]:
    """Returns numbers for the log, see `DiffusionRecipe.loss`.

    Args:
        compared: of the supervised tokens, in order.
        wanted: ``[R, N, k]`` bool, tokens of a block that lie in the text and are masks.
        supervised: ``[R, N, k]`` bool, those of them that can be drafted.
        greedy: ``[R]`` bool, texts written greedily.
    """
    chances = torch.zeros(supervised.shape, device=supervised.device)
    chances[supervised] = compared.accepted.float()
    hits = torch.zeros_like(chances)
    hits[supervised] = compared.hits.float()
    metrics = {
        f"accept_{k + 1}": float(chances[..., k][wanted[..., k]].mean())
        for k in range(wanted.shape[-1])
        if bool(wanted[..., k].any())
    }
    whole = wanted.all(dim=-1)  # blocks that the text does not end in
    if bool(whole.any()):
        metrics["expected_efficiency"] = 1.0 + float(chances[whole].cumprod(-1).sum(-1).mean())
    certain = whole & greedy.unsqueeze(-1)
    if bool(certain.any()):
        metrics["greedy_efficiency"] = 1.0 + float(hits[certain].cumprod(-1).sum(-1).mean())
    return metrics
