"""How a node gets its children: the four ways of choosing tokens from a draft law."""

from __future__ import annotations

import torch

from specdec.random import RandomSource
from specdec.types import Draw, LawRows


def choose_tokens(
    rows: LawRows, index: int, count: int, draw: Draw, random: RandomSource, position: int
) -> list[int]:
    """Returns up to `count` tokens from row `index`, in the order in which they are to be tested.

    Args:
        rows: laws as the drafter gave them.
        index: which row.
        count: how many children are wanted; fewer come back when the support is smaller.
        draw: how to choose.
        random: the draft stream.
        position: absolute position of the children, for the keyed noise of COUPLED.
    """
    log_probs = rows.log_probs[index]
    ids = None if rows.ids is None else rows.ids[index]
    count = min(count, int((log_probs > -torch.inf).sum()))
    if count == 0:
        return []
    if draw == Draw.IID:
        weights = log_probs.exp()
        chosen = [random.categorical(weights) for _ in range(count)]
    elif draw == Draw.WOR:
        chosen = random.top_k_without_replacement(log_probs, count)
    else:
        scores = log_probs
        if draw == Draw.COUPLED:
            token_ids = torch.arange(len(scores), device=scores.device) if ids is None else ids
            scores = log_probs.double() + random.keyed_noise(position, token_ids.clamp(min=0))
        chosen = torch.topk(scores, count).indices.tolist()
    return chosen if ids is None else [int(ids[i]) for i in chosen]
