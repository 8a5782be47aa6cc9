"""transformers' truncations at a tenth of their cost: the same tokens stay, bit for bit.

On a CPU the nucleus' argsort and the selection of top-k are most of what a sampled token costs
beside the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from specdec.kernels.top_k_rows import takes_first, top_k_rows_native

_LANES = 64  # a multiple of what any processor sums at once, several vectors together


def cheaper(processor: Any) -> Any:
    """Returns a processor that does the same, faster where it is a truncation of transformers'."""
    if type(processor) is TopPLogitsWarper:
        return SortedTopPLogitsWarper(
            processor.top_p, processor.filter_value, processor.min_tokens_to_keep
        )
    if type(processor) is TopKLogitsWarper:
        return NativeTopKLogitsWarper(processor.top_k, processor.filter_value)
    return processor


class NativeTopKLogitsWarper(TopKLogitsWarper):
    """Keeps the very tokens that `TopKLogitsWarper` keeps: those not below the k-th largest."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Tensor:
        """Returns ``[n, V]`` scores, `filter_value` where a token falls away."""
        top_k = min(self.top_k, scores.shape[-1])
        if not takes_first(scores, top_k):
            theirs: Tensor = super().__call__(input_ids, scores)
            return theirs
        least = top_k_rows_native(scores.detach(), top_k)[0][:, -1:]
        return _without(scores, least.numpy(), self.filter_value)


class SortedTopPLogitsWarper(TopPLogitsWarper):
    """Keeps the very tokens that `TopPLogitsWarper` keeps.

    That one sorts logits with their places, adds up from the least, and carries what falls away
    back to its place. The sums say up to which value tokens fall away, so the values sorted by
    themselves are enough: same values, same sums, same bits. Only where equal logits lie on both
    sides of that border does the order of their places decide, and then it is asked.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Tensor:
        """Returns ``[n, V]`` scores, `filter_value` where a token falls away."""
        own = None
        if scores.device.type == "cpu" and scores.dtype == torch.float32:
            own = self._kept(scores)
        theirs: Tensor = super().__call__(input_ids, scores) if own is None else own
        return theirs

    def _kept(self, scores: Tensor) -> Tensor | None:
        """Returns what is wanted; None where equal logits lie on both sides of the border."""
        given = scores.detach().numpy()
        ordered = _ascending(given)
        left_out = given.shape[-1] - ordered.shape[-1]
        sums = torch.from_numpy(ordered).softmax(dim=-1).cumsum(dim=-1).numpy()
        border = np.float32(1 - self.top_p)
        most = max(ordered.shape[-1] - self.min_tokens_to_keep, -left_out)
        # numpy's calls: torch's take five times as long on a row
        fallen = [min(int(row.searchsorted(border, "right")), most) for row in sums]
        if left_out and min(fallen) <= 0:
            return None  # the border is among what was left out
        least = [values[count] for values, count in zip(ordered, fallen, strict=True)]  # that stays
        for values, count, value in zip(ordered, fallen, least, strict=True):
            if count and values[count - 1] == value:
                return None
        return _without(scores, np.array(least)[:, None], self.filter_value)


def _ascending(scores: np.ndarray) -> np.ndarray:
    """Returns ``[n, <= V]`` scores sorted, without most of those that are minus infinity.

    They are left out by whole lanes of the processor's vectors, one of which stays, so that sums
    over what is left run in the same order: zeros are all that falls away.
    """
    possible = scores != -np.inf
    width = scores.shape[-1]
    needed = int(np.count_nonzero(possible, axis=-1).max()) + _LANES
    left_out = (width - needed) // _LANES * _LANES
    if left_out < width // 2:
        return np.sort(scores, axis=-1)
    ordered = np.full((len(scores), width - left_out), -np.inf, dtype=scores.dtype)
    for row, own, kept in zip(ordered, scores, possible, strict=True):
        some = np.sort(own[kept])
        row[len(row) - len(some) :] = some
    return ordered


def _without(scores: Tensor, least: np.ndarray, filter_value: float) -> Tensor:
    """Returns scores ``[n, V]`` where those below the least ``[n, 1]`` that stay are replaced."""
    given = scores.detach().numpy()
    return torch.from_numpy(np.where(given < least, np.float32(filter_value), given))
