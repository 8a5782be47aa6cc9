"""The choice of Gumbel-max sampling: the place of the largest score plus keyed noise."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.kernels import philox_native
from specdec.kernels.philox import gumbel, keyed_gumbel_dense, keyed_words

# a score that lies so far below what another one reaches needs noise that few tokens have
_NEAR = 6.0
_SLACK = 1.0 + 1e-4  # of a word's bound, beyond what float32 rounds
_RARE = int(2.0**32 * np.exp(-_NEAR) * _SLACK)


def keyed_argmax(scores: Tensor, seed: int, row: int, position: int) -> int:
    """Returns the place of the largest ``scores + keyed_gumbel``, the first of several.

    On a CPU the noise is evaluated only where it could still win: g = -log(-log(1 - u)) is at most
    -log u, so a score that lies d below what another reaches needs u <= exp(-d).

    Args:
        scores: ``[V]`` floating point, the largest one finite.
        seed: as `keyed_gumbel` takes it; so are the next two.
        row: number of the row.
        position: absolute position of the token to be chosen.
    """
    if scores.device.type != "cpu":
        return keyed_argmax_reference(scores, seed, row, position)
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()
    raw = scores.detach().numpy()
    if raw.dtype == np.float32 and philox_native.serves():
        place = philox_native.choice(seed, row, position, raw)
        return keyed_argmax_reference(scores, seed, row, position) if place < 0 else place
    support, words = _candidates(seed, row, position, raw)
    if len(support) == 1:
        return int(support[0])
    if len(support) == 0:  # the largest is not finite
        return keyed_argmax_reference(scores, seed, row, position)
    noise = gumbel(torch.from_numpy(words.astype(np.int64)))
    return int(support[int(torch.argmax(scores[torch.from_numpy(support)].double() + noise))])


def _candidates(
    seed: int, row: int, position: int, raw: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places ``[c]`` of scores that may be the largest with their noise, and its words.

    With numpy, also for float64; the largest score is finite.
    """
    top = int(raw.argmax())
    values = raw - raw[top]  # near the top exact, wherever the scores lie
    words = keyed_words(seed, row, position, len(values))
    reached = float(gumbel(torch.tensor(int(words[top]))))
    support = np.flatnonzero((values > reached - _NEAR) | (words <= _RARE))
    bounds = np.exp(values[support].astype(np.float64) - reached) * (2.0**32 * _SLACK)
    support = support[words[support] <= bounds]
    return support, words[support]


def keyed_argmax_reference(scores: Tensor, seed: int, row: int, position: int) -> int:
    """Does what `keyed_argmax` says, with the noise of every token; on any device."""
    noise = keyed_gumbel_dense(seed, row, position, len(scores), scores.device)
    # sync: one number leaves the device
    return int(torch.argmax(scores.double() + noise))
