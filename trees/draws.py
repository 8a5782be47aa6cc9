"""How nodes get their children: the four ways of choosing tokens from draft laws."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from specdec.random import RandomSource
from specdec.types import Draw, LawRows, Root


def choose_tokens(
    rows: LawRows, counts: Sequence[int], draw: Draw, random: RandomSource, root: Root, depth: int
) -> list[list[tuple[int, float]]]:
    """Returns up to `counts[i]` tokens from row i, in the order in which they are to be tested.

    Each comes with its probability in the row.

    Args:
        rows: the laws of one level, as the drafter gave them.
        counts: children wanted of each row; fewer come back when the support is smaller.
        draw: how to choose.
        random: the draft stream.
        root: of the tree; its position, and the depth, key the noise of COUPLED. A greedy target
            has no noise.
        depth: of the children.
    """
    log_probs = rows.log_probs
    if draw == Draw.WOR:
        streams = random.without_replacement(log_probs)
        places = [
            [place for place, _ in islice(stream, count)]
            for stream, count in zip(streams, counts, strict=True)
        ]
    elif draw == Draw.IID:
        known = (log_probs > -torch.inf).any(dim=-1).tolist()
        places = [
            [random.categorical(weights) for _ in range(count)] if some else []
            for weights, count, some in zip(log_probs.exp(), counts, known, strict=True)
        ]
    else:
        scores = log_probs
        if draw == Draw.COUPLED and not root.greedy:
            scores = log_probs.double() + _keyed_noise(rows, random, root.position + depth)
        places = _top(scores, counts)
    return _named(rows, places)


def _named(rows: LawRows, places: list[list[int]]) -> list[list[tuple[int, float]]]:
    """Returns the token and the probability at each place."""
    row = [index for index, chosen in enumerate(places) for _ in chosen]
    column = [place for chosen in places for place in chosen]
    tokens = column if rows.ids is None else rows.ids[row, column].tolist()
    named = zip(tokens, rows.log_probs[row, column].exp().tolist(), strict=True)
    return [list(islice(named, len(chosen))) for chosen in places]


def _keyed_noise(rows: LawRows, random: RandomSource, position: int) -> Tensor:
    """Returns the verifier's noise at `position` for the tokens of each row."""
    if rows.ids is None:
        width = rows.log_probs.shape[1]
        return random.keyed_noise(position, torch.arange(width, device=rows.log_probs.device))
    known = rows.ids.clamp(min=0)
    return random.keyed_noise(position, known.flatten()).reshape(known.shape)


def _top(scores: Tensor, counts: Sequence[int]) -> list[list[int]]:
    """Returns the places of the `counts[i]` largest finite scores of each row, largest first."""
    top = torch.topk(scores, min(max(counts, default=0), scores.shape[1]), dim=-1)
    finite = (top.values > -torch.inf).sum(dim=-1).tolist()
    return [
        row[: min(count, some)]
        for row, count, some in zip(top.indices.tolist(), counts, finite, strict=True)
    ]
