"""The largest entry of one long row."""

from __future__ import annotations

import torch
from torch import Tensor


def argmax_row(scores: Tensor) -> int:
    """Returns the place of the largest entry, the first of several; NaN counts as the largest.

    On a CPU numpy's, which is vectorised: 17 us for 49152 entries where torch's takes 120.

    Args:
        scores: ``[V]`` floating point.
    """
    if scores.device.type == "cpu" and scores.dtype is not torch.bfloat16:  # numpy has none
        return int(scores.detach().numpy().argmax())
    # sync: one number leaves the device
    return int(torch.argmax(scores))
