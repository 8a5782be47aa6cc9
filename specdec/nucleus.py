"""transformers' nucleus without its argsort, which is most of what a sampled token costs here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TopPLogitsWarper


def without_argsort(processor: Any) -> Any:
    """Returns a processor that does the same, faster where it is transformers' own nucleus."""
    if type(processor) is not TopPLogitsWarper:
        return processor
    return SortedTopPLogitsWarper(
        processor.top_p, processor.filter_value, processor.min_tokens_to_keep
    )


class SortedTopPLogitsWarper(TopPLogitsWarper):
    """Keeps the very tokens that `TopPLogitsWarper` keeps.

    That one sorts logits with their places, adds up from the least, and carries what falls away
    back to its place. The sums say up to which value tokens fall away, so the values sorted by
    themselves are enough, in a tenth of the time: same values, same sums, same bits. Only where
    equal logits lie on both sides of that border does the order of their places decide, and then
    it is asked.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Tensor:
        """Returns ``[n, V]`` scores, `filter_value` where a token falls away."""
        own = None
        if scores.device.type == "cpu" and scores.dtype == torch.float32:
            own = self._kept(scores.detach().numpy())
        theirs: Tensor = super().__call__(input_ids, scores) if own is None else own
        return theirs

    def _kept(self, given: np.ndarray) -> Tensor | None:
        """Returns what is wanted; None where equal logits lie on both sides of the border."""
        ordered = np.sort(given, axis=-1)
        sums = torch.from_numpy(ordered).softmax(dim=-1).cumsum(dim=-1).numpy()
        most = max(ordered.shape[-1] - self.min_tokens_to_keep, 0)
        # numpy's calls: torch's take five times as long on a row
        fallen = [min(int(row.searchsorted(self._border, "right")), most) for row in sums]
        least = [values[count] for values, count in zip(ordered, fallen, strict=True)]  # that stays
        for values, count, value in zip(ordered, fallen, least, strict=True):
            if count and values[count - 1] == value:
                return None
        falls = given < np.array(least)[:, None]
        return torch.from_numpy(np.where(falls, np.float32(self.filter_value), given))

    @property
    def _border(self) -> np.float32:
        return np.float32(1 - self.top_p)
