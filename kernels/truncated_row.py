"""Temperature and top-k of one row in one call of C: what is left, and where."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.native import library, why_not

MOST_K = 64  # a list that is kept sorted by insertion
MOST_LEFT = 8 * MOST_K  # of top-k only where many are equal; of a nucleus' tokens
_SOURCE = Path(__file__).with_suffix(".c")


class TruncatedRow(NamedTuple):
    """What is left of a row.

    Attributes:
        values: ``[c]`` float32, logits divided by the temperature.
        ids: ``[c]`` int64, whose they are, rising.
        scores: ``[V]`` float32, minus infinity everywhere: room for the result.
    """

    values: np.ndarray
    ids: np.ndarray
    scores: np.ndarray


def truncated_row(logits: Tensor, k: int, temperature: float) -> TruncatedRow | None:
    """Returns the entries that transformers' temperature and top-k leave, with the same bits.

    Args:
        logits: ``[V]`` float32 on the CPU, contiguous.
        k: of top-k; those that equal the k-th largest stay too.
        temperature: above 0.

    Returns:
        None where this cannot be done here: no C compiler, a large k, many equal entries, entries
        that are no finite number among the first k.
    """
    width = len(logits)
    fits = logits.is_cpu and logits.dtype is torch.float32 and logits.is_contiguous()
    if not fits or not 0 < k <= min(MOST_K, width) or why_not(_SOURCE) is not None:
        return None
    scores = np.empty(width, np.float32)
    values, ids = np.empty(MOST_LEFT, np.float32), np.empty(MOST_LEFT, np.int64)
    count = _function()(
        *(logits.data_ptr(), width, k, temperature),
        *(own.ctypes.data for own in (scores, values, ids)),
    )
    return None if count < 0 else TruncatedRow(values[:count], ids[:count], scores)


@functools.cache
def _function() -> Callable[..., int]:
    function: Any = library(_SOURCE).truncated_row
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, size, ctypes.c_int, ctypes.c_float, *(pointer,) * 3]
    function.restype = size
    return function  # type: ignore[no-any-return]
