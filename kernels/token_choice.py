"""Single choices of C code by the logits of one node: what `multi_step` makes many of.

For tests: within several steps nobody sees what a nucleus left.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.native import library
from specdec.kernels.step_structs import ChoosingStruct
from specdec.kernels.truncated_row import MOST_LEFT

_SOURCE = Path(__file__).with_suffix(".c")


def sampled_token(choosing: ChoosingStruct, logits: Tensor, position: int) -> int | None:
    """Returns what C code chooses at a node, None where others must.

    Args:
        choosing: by noise.
        logits: ``[V]`` float32, contiguous.
        position: absolute position of the token.
    """
    token: int = _asked("token_choice", choosing, logits, position)
    return None if token < 0 else token


def left_tokens(choosing: ChoosingStruct, logits: Tensor) -> list[int] | None:
    """Returns the tokens that a truncation leaves, rising, None where others must tell.

    Args:
        choosing: with top-k or a nucleus.
        logits: ``[V]`` float32, contiguous.
    """
    ids = (ctypes.c_int64 * MOST_LEFT)()
    count = _asked("token_choice_left", choosing, logits, ctypes.addressof(ids))
    return None if count < 0 else ids[:count]


def _asked(name: str, choosing: ChoosingStruct, logits: Tensor, last: int) -> int:
    room = torch.empty_like(logits)
    choosing.room = room.data_ptr()
    function: Any = getattr(library(_SOURCE), name)
    size = ctypes.c_int64
    function.argtypes = [ctypes.POINTER(ChoosingStruct), ctypes.c_void_p, size, size]
    function.restype = size
    result: int = function(choosing, logits.data_ptr(), len(logits), last)
    return result
