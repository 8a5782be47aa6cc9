"""RMS norm of rows in one call, where a model makes it of eight operators."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.native import library, why_not

IMPLEMENTATIONS = ("reference", "native")
_SOURCE = Path(__file__).with_suffix(".c")


def rms_norm(
    rows: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, impl: str = "native"
) -> Tensor:
    """Returns ``rows / sqrt(mean(rows ** 2) + eps) * (weight + offset)`` over the last dimension.

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4; Gemma's weights count from one.

    Args:
        rows: ``[..., D]`` float32 on the CPU.
        weight: ``[D]`` float32, contiguous.
        eps: added to the mean of squares.
        offset: added to the weight.
        impl: "reference", or "native": C, compiled when it is first called.

    Returns:
        ``[..., D]`` float32, contiguous.

    Raises:
        ValueError: if shapes or dtypes do not fit, or there is no such implementation.
        NativeError: if "native" is asked for and C code cannot be had here.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"rms_norm: impl must be one of {IMPLEMENTATIONS}; got {impl!r}")
    if rows.dtype != torch.float32 or weight.dtype != torch.float32 or not _alike(rows, weight):
        raise ValueError(
            "rms_norm takes float32 rows [..., D] and a weight [D] on the CPU; got "
            f"{list(rows.shape)} {rows.dtype} on {rows.device} and {list(weight.shape)} "
            f"{weight.dtype} on {weight.device}"
        )
    if impl == "reference":
        squares = rows.square().mean(dim=-1, keepdim=True)
        return rows * torch.rsqrt(squares + eps) * (weight + offset)
    rows = rows.contiguous()
    width = rows.shape[-1]
    output = torch.empty_like(rows)
    _function()(
        rows.data_ptr(),
        weight.data_ptr(),
        output.data_ptr(),
        rows.numel() // width,
        width,
        eps,
        offset,
    )
    return output


def why_not_native() -> str | None:
    """Returns why "native" cannot be had here, None if it can; compiles it on the way."""
    return why_not(_SOURCE)


def _alike(rows: Tensor, weight: Tensor) -> bool:
    on_cpu = rows.device.type == weight.device.type == "cpu"
    return on_cpu and weight.shape == rows.shape[-1:] and weight.is_contiguous()


@functools.cache
def _function() -> Callable[..., None]:
    function: Any = library(_SOURCE).rms_norm
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    function.argtypes = [pointer, pointer, pointer, size, size, number, number]
    function.restype = None
    return function  # type: ignore[no-any-return]
