"""transformers' truncations at a tenth of their cost: the same tokens stay, bit for bit.

On a CPU the nucleus' argsort and the selection of top-k are most of what a sampled token costs
beside the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.kernels.top_k_rows import takes_first, top_k_rows_native
from specdec.kernels.truncated_row import truncated_row

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


def joined(processors: Sequence[Any]) -> list[Any]:
    """Returns processors of which temperature, top-k and nucleus in a row are done together.

    Args:
        processors: as `cheaper` gave them, in order.
    """
    made: list[Any] = []
    for processor in processors:
        kind = type(processor)
        before = made[-1] if made else None
        if kind is NativeTopKLogitsWarper and processor.filter_value == -np.inf:
            temperature = before if type(before) is TemperatureLogitsWarper else None
            if temperature is not None:
                made.pop()
            made.append(JoinedLogitsWarper(temperature, processor))
        elif (
            kind is SortedTopPLogitsWarper
            and processor.filter_value == -np.inf
            and isinstance(before, JoinedLogitsWarper)
            and before.top_p is None
        ):
            made[-1] = JoinedLogitsWarper(before.temperature, before.top_k, processor)
        else:
            made.append(processor)
    return made


class Truncation(NamedTuple):
    """What temperature, top-k and nucleus leave, as numbers.

    Attributes:
        temperature: 1 for none.
        top_k: 0 for all tokens.
        border: the chance up to which tokens fall away, added up from the least likely one; None
            without a nucleus.
        min_kept: tokens that a nucleus leaves at least.
    """

    temperature: float = 1.0
    top_k: int = 0
    border: float | None = None
    min_kept: int = 1


def truncation_of(processors: Sequence[Any]) -> Truncation | None:
    """Returns what the processors of a row do, if that is all they do; else None.

    Args:
        processors: as `joined` gave them; none at all leave everything.
    """
    parts = list(processors)
    if len(parts) == 1 and type(parts[0]) is JoinedLogitsWarper:
        parts = parts[0].parts
    made = Truncation()
    if parts and type(parts[0]) is TemperatureLogitsWarper:
        made = made._replace(temperature=parts.pop(0).temperature)
    if parts and _is_plain(parts[0], NativeTopKLogitsWarper):
        made = made._replace(top_k=parts.pop(0).top_k)
    if parts and _is_plain(parts[0], SortedTopPLogitsWarper):
        nucleus = parts.pop(0)
        made = made._replace(border=float(nucleus.border), min_kept=nucleus.min_tokens_to_keep)
    return None if parts else made


def temperature_among(processors: Sequence[Any]) -> TemperatureLogitsWarper | None:
    """Returns what of a truncation may be turned from outside: all else are our own copies."""
    for processor in processors:
        own = processor.temperature if type(processor) is JoinedLogitsWarper else processor
        if type(own) is TemperatureLogitsWarper:
            return own
    return None


def _is_plain(processor: Any, kind: type) -> bool:
    cuts = type(processor) is kind
    return cuts and bool(processor.filter_value == -np.inf)


class JoinedLogitsWarper(LogitsProcessor):
    """Does what its parts do one after the other, with the same bits, in a few sweeps together.

    Args:
        temperature: None for 1.
        top_k: of `cheaper`.
        top_p: of `cheaper`; None for all.
    """

    writes_anew = True  # never what it was given, nor to it

    def __init__(
        self,
        temperature: TemperatureLogitsWarper | None,
        top_k: NativeTopKLogitsWarper,
        top_p: SortedTopPLogitsWarper | None = None,
    ) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    @property
    def parts(self) -> list[Any]:
        """What it does, in order."""
        every = (self.temperature, self.top_k, self.top_p)
        return [part for part in every if part is not None]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Tensor:
        """Returns ``[n, V]`` scores, minus infinity where a token falls away."""
        own = self._kept(scores) if len(scores) == 1 else None
        if own is not None:
            return own
        made: Any = scores
        for part in self.parts:
            made = part(input_ids, made)
        one_by_one: Tensor = made
        return one_by_one

    def _kept(self, scores: Tensor) -> Tensor | None:
        temperature = 1.0 if self.temperature is None else self.temperature.temperature
        left = truncated_row(scores.detach()[0], self.top_k.top_k, temperature)
        if left is None:
            return None
        values, ids, made = left
        if self.top_p is not None:
            ordered = _rising([values], len(made))
            least = self.top_p.least_kept(ordered, len(made) - ordered.shape[1])
            if least is None:
                return None
            stay = values >= least[0]
            values, ids = values[stay], ids[stay]
        made[ids] = values
        return torch.from_numpy(made).unsqueeze(0)


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
        least = self.least_kept(ordered, given.shape[-1] - ordered.shape[-1])
        return None if least is None else _without(scores, least[:, None], self.filter_value)

    @property
    def border(self) -> np.float32:
        """The chance up to which tokens fall away."""
        return np.float32(1 - self.top_p)

    def least_kept(self, ordered: np.ndarray, left_out: int) -> np.ndarray | None:
        """Returns ``[n]``, the least score of each row that stays.

        Args:
            ordered: ``[n, W]`` float32 scores, rising.
            left_out: scores of minus infinity that are not among them, by whole lanes.

        Returns:
            None where equal scores lie on both sides of the border, or it is not among `ordered`.
        """
        sums = torch.from_numpy(ordered).softmax(dim=-1).cumsum(dim=-1).numpy()
        most = max(ordered.shape[-1] - self.min_tokens_to_keep, -left_out)
        # numpy's calls: torch's take five times as long on a row
        fallen = [min(int(row.searchsorted(self.border, "right")), most) for row in sums]
        if left_out and min(fallen) <= 0:
            return None  # the border is among what was left out
        least = [values[count] for values, count in zip(ordered, fallen, strict=True)]  # that stays
        for values, count, value in zip(ordered, fallen, least, strict=True):
            if count and values[count - 1] == value:
                return None
        return np.array(least)


def _ascending(scores: np.ndarray) -> np.ndarray:
    """Returns ``[n, <= V]`` scores sorted, without most of those that are minus infinity.

    They are left out by whole lanes of the processor's vectors, one of which stays, so that sums
    over what is left run in the same order: zeros are all that falls away.
    """
    possible = scores != -np.inf
    width = scores.shape[-1]
    count = int(np.count_nonzero(possible, axis=-1).max())
    if 2 * (count + _LANES) > width:
        return np.sort(scores, axis=-1)
    return _rising([own[kept] for own, kept in zip(scores, possible, strict=True)], width)


def _rising(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Returns ``[n, <= V]`` of the possible scores of rows of V, as `_ascending` describes."""
    left_out = max(width - max(map(len, rows)) - _LANES, 0) // _LANES * _LANES
    ordered = np.full((len(rows), width - left_out), -np.inf, dtype=np.float32)
    for row, own in zip(ordered, rows, strict=True):
        row[len(row) - len(own) :] = np.sort(own)
    return ordered


def _without(scores: Tensor, least: np.ndarray, filter_value: float) -> Tensor:
    """Returns scores ``[n, V]`` where those below the least ``[n, 1]`` that stay are replaced."""
    given = scores.detach().numpy()
    return torch.from_numpy(np.where(given < least, np.float32(filter_value), given))
