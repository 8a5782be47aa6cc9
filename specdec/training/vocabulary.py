"""Which tokens a target writes most: a drafter's head over these alone costs a fraction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.training.corpus import OwnText


def most_written(texts: Sequence[OwnText], vocab_size: int, count: int) -> Tensor:
    """Returns ``[count]`` int64 ids in ascending order, those that the laws of the texts favour.

    Args:
        texts: the target's own; the chances that their laws give a token are summed up.
        vocab_size: width of the target's logits.
        count: how many ids, at most `vocab_size`.
    """
    expected = torch.zeros(vocab_size, dtype=torch.float64)
    for text in texts:
        named = text.top_ids >= 0
        expected.index_add_(0, text.top_ids[named], text.top_log_probs[named].double().exp())
        # what it read: rare words of a prompt come again
        expected.index_add_(
            0, text.tokens, torch.full((len(text.tokens),), 1e-3, dtype=torch.float64)
        )
    # equal counts go to the lower id, whatever the sort
    order = torch.argsort(expected, descending=True, stable=True)[:count]
    return order.sort().values
