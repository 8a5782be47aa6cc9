"""Top-k of every row of a wide matrix: a selection that looks at each entry once."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.native import library, why_not

_BLOCK = 64
MOST_NATIVE = 64  # a list that is kept sorted by insertion; MOST_SELECTED in top_k.h
MOST_OF_TRITON = 64  # k of `top_k_triton`, which holds all blocks' candidates in registers
_SOURCE = Path(__file__).with_suffix(".c")


def top_k_rows(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns values and ids ``[N, k]`` of the k largest entries of each row, largest first.

    NaN counts as the largest.

    Args:
        logits: ``[N, V]`` floating point.
        k: at most V.
    """
    if takes_first(logits, k):
        return top_k_rows_native(logits, k)
    return top_k_rows_blocked(logits, k)


def takes_first(logits: Tensor, k: int) -> bool:
    """Returns whether `top_k_rows` takes the first of equal entries, as an argmax does.

    So it is on a CPU in float32, where it runs C code, if that can be compiled.
    """
    native = logits.device.type == "cpu" and logits.dtype == torch.float32
    fits = 0 < k <= min(MOST_NATIVE, logits.shape[-1])
    return native and fits and why_not(_SOURCE) is None


def top_k_rows_native(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Does what `top_k_rows` says in one sweep of C code; float32 on the CPU, k at most V."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, width = logits.shape
    values = logits.new_empty(rows, k)
    ids = torch.empty(rows, k, dtype=torch.int64)
    _function()(
        logits.data_ptr(),
        rows,
        width,
        logits.stride(0),
        k,
        values.data_ptr(),
        ids.data_ptr(),
        min(torch.get_num_threads(), max(1, rows)),
    )
    return values, ids


def top_k_rows_blocked(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Does what `top_k_rows` says with torch, on any device.

    A row's k largest entries lie in the k blocks with the largest maxima, so one sweep of maxima
    and a small top-k replace a selection over the whole row.
    """
    rows, width = logits.shape
    blocks = width // _BLOCK
    if blocks <= k:
        top = torch.topk(logits, k, dim=-1)
        return top.values, top.indices
    blocked = logits[:, : blocks * _BLOCK].reshape(rows, blocks, _BLOCK)
    best = torch.topk(blocked.amax(dim=-1), k, dim=-1).indices
    ids = best.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    ids = ids.flatten(1)
    tail = torch.arange(blocks * _BLOCK, width, device=logits.device).expand(rows, -1)
    ids = torch.cat([ids, tail], dim=-1)
    top = torch.topk(logits.gather(-1, ids), k, dim=-1)
    return top.values, ids.gather(-1, top.indices)


@functools.cache
def _function() -> Callable[..., None]:
    function: Any = library(_SOURCE).top_k_rows
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    function.argtypes = [pointer, size, size, size, number, pointer, pointer, number]
    function.restype = None
    return function  # type: ignore[no-any-return]
