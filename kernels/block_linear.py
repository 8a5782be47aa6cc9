"""Few rows times a weight in blocks: the linear layers of a verifying pass on a CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from specdec.kernels.native import library, why_not
from specdec.kernels.weight_blocks import BlockWeight, Form, from_blocks

IMPLEMENTATIONS = ("reference", "native")
MOST_ROWS = 128  # of one call of C, as in block_panels.h
_SOURCE = Path(__file__).with_suffix(".c")


def block_linear(
    rows: Tensor, weight: BlockWeight, bias: Tensor | None = None, *, impl: str = "native"
) -> Tensor:
    """Returns ``rows @ weight.T + bias`` in float32 arithmetic.

    With "native" a row's result is the same bits for any number of other rows.

    Args:
        rows: ``[..., K]`` float32 on the CPU.
        weight: `to_blocks`' ``[N, K]``.
        bias: ``[N]`` float32, or None.
        impl: "reference", or "native": C, compiled when it is first called.

    Returns:
        ``[..., N]`` float32.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or the weight has a form that "native"
            does not multiply with on this machine (`multiplies_bytes`).
        NativeError: if "native" is asked for and C code cannot be had here.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"block_linear: impl must be one of {IMPLEMENTATIONS}; got {impl!r}")
    width = weight.num_inputs
    if rows.shape[-1] != width or rows.dtype != torch.float32 or rows.device.type != "cpu":
        raise ValueError(
            f"rows must be [..., {width}] float32 on the CPU; got {list(rows.shape)} {rows.dtype} "
            f"on {rows.device}"
        )
    if impl == "reference":
        return linear(rows, from_blocks(weight), bias)
    if not serves(weight.form):
        raise ValueError(f"this machine has no products of bytes, which {weight.form.name} is for")
    rows = rows.contiguous()
    output = rows.new_empty(*rows.shape[:-1], weight.num_outputs)
    given, written, count = rows.data_ptr(), output.data_ptr(), rows.numel() // width
    size, run = _functions()
    needed = size(weight.form.value, min(MOST_ROWS, count), width)
    room = torch.empty(needed, dtype=torch.float32) if needed else None
    for first in range(0, count, MOST_ROWS):
        run(
            weight.form.value,
            given + first * width * rows.itemsize,
            weight.data.data_ptr(),
            None if bias is None else bias.data_ptr(),
            written + first * weight.num_outputs * output.itemsize,
            min(MOST_ROWS, count - first),
            width,
            weight.num_outputs,
            torch.get_num_threads(),
            None if room is None else room.data_ptr(),
        )
    return output


@functools.cache
def multiplies_bytes() -> bool:
    """Returns whether "native" multiplies with integers as `for_dots` has them, which is faster.

    Raises:
        NativeError: if C code cannot be had here.
    """
    return bool(library(_SOURCE).block_dots())


def serves(form: Form) -> bool:
    """Returns whether "native" multiplies with weights of a form on this machine."""
    return form not in (Form.DOT8, Form.DOT4) or multiplies_bytes()


def why_not_native() -> str | None:
    """Returns why "native" cannot be had here, None if it can; compiles it on the way."""
    return why_not(_SOURCE)


@functools.cache
def _functions() -> tuple[Callable[..., int], Callable[..., None]]:
    """Returns `block_linear_room` and `block_linear` of the C code."""
    loaded: Any = library(_SOURCE)
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.block_linear_room.argtypes = [number, number, size]
    loaded.block_linear_room.restype = size
    loaded.block_linear.argtypes = [number, *[pointer] * 4, number, size, size, number, pointer]
    loaded.block_linear.restype = None
    return loaded.block_linear_room, loaded.block_linear
