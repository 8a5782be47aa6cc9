"""Weight layouts in which a CPU multiplies few rows faster than `torch.nn.functional.linear`.

Each gives float32 results of float32 arithmetic, which differ from `linear` in the order of sums;
integers are summed as integers where a processor multiplies bytes, by inputs that are rounded to
2**-24 of the largest of their 32 neighbours (`kernels/byte_dots.h`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.kernels.block_linear import MOST_ROWS, block_linear, multiplies_bytes, why_not_native
from specdec.kernels.layer_parts import Product
from specdec.kernels.weight_blocks import for_dots, to_blocks

# float32's unit roundoff: a change of the weights below it drowns in the rounding of the products
_ROUNDOFF = 2.0**-24


class PackedWeight(NamedTuple):
    """A weight in another layout.

    Attributes:
        run: ``[..., K]`` float32 to ``[..., N]``, the bias added.
        nbytes: what the layout takes, beside the model's own weight.
        layout: what it is called in reports.
        most_rows: beyond which `linear` may be faster, to be measured; None if it never is.
        product: the layer in blocks, for C code that computes more than one; None in other layouts.
    """

    run: Callable[[Tensor], Tensor]
    nbytes: int
    layout: str
    most_rows: int | None = None
    product: Product | None = None


def pack_blocks(weight: Tensor, bias: Tensor | None) -> PackedWeight | None:
    """Returns the weight in our own blocks, None where C code cannot be compiled.

    The numbers are kept in the smallest form that holds them exactly: integers where they come from
    a quantised file, bfloat16 where they come from such a checkpoint (`kernels.weight_blocks`).
    A row's results do not depend on how many others are multiplied with it.
    """
    if reason_against("blocks"):
        return None
    blocks = to_blocks(weight)
    if multiplies_bytes():
        blocks = for_dots(blocks)
    bias = None if bias is None else bias.contiguous()
    run = partial(block_linear, weight=blocks, bias=bias)
    layout = f"blocks of {blocks.form.name.lower()}"
    return PackedWeight(run, blocks.data.nbytes, layout, MOST_ROWS, Product(blocks, bias))


def pack_onednn(weight: Tensor, bias: Tensor | None) -> PackedWeight | None:
    """Returns the weight in oneDNN's blocked layout, None where torch has no oneDNN.

    On AMD and ARM it is far ahead of `linear` for 2 to 64 rows, since it uses all threads there;
    its rows do not depend on how many others are multiplied with them.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    # the row count is a hint: a weight packed for 8 rows is right for any number
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    multiply: Any = torch.ops.mkldnn._linear_pointwise.default

    def run(rows: Tensor) -> Tensor:
        product: Tensor = multiply(rows, packed, bias, "none", [], "")
        return product

    return PackedWeight(run, weight.nbytes, "onednn")


def pack_mkl(weight: Tensor, bias: Tensor | None) -> PackedWeight | None:
    """Returns the weight in MKL's packed layout, None where torch has no MKL.

    The packed tensor must never be cloned: its data depend on their own address.
    """
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return None
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, 8)
    multiply: Any = torch.ops.mkl._mkl_linear.default
    shape_only = weight.new_zeros(1).expand(weight.shape)

    def run(rows: Tensor) -> Tensor:
        # only with the actual row count does the operator look at the packed weight
        count = rows.numel() // rows.shape[-1]
        product: Tensor = multiply(rows, packed, shape_only, bias, count)
        return product

    return PackedWeight(run, weight.nbytes, "mkl")


def pack_fp16(weight: Tensor, bias: Tensor | None) -> PackedWeight | None:
    """Returns the weight as float16 for FBGEMM, None if float16 or this torch cannot hold it.

    Products and sums are float32 all the same; what is halved is the memory read for each pass.
    Weights of a checkpoint in float16 or bfloat16 fit, apart from bfloat16's tiniest values:
    accepted is a change below float32's unit roundoff, relative to the matrix (Frobenius norm).
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    change = torch.linalg.vector_norm(weight.to(torch.float16).float() - weight)
    if not change <= _ROUNDOFF * torch.linalg.vector_norm(weight):
        return None
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    multiply: Any = torch.ops.quantized.linear_dynamic_fp16.default

    def run(rows: Tensor) -> Tensor:
        product: Tensor = multiply(rows, packed)
        return product

    return PackedWeight(run, weight.nbytes // 2, "fp16")


FORMATS: dict[str, Callable[[Tensor, Tensor | None], PackedWeight | None]] = {
    "blocks": pack_blocks,
    "fp16": pack_fp16,
    "onednn": pack_onednn,
    "mkl": pack_mkl,
}


def reason_against(form: str) -> str:
    """Returns why a format cannot be had here, to be put behind a sentence; "" if not known."""
    reason = why_not_native() if form == "blocks" else None
    return f": {reason}" if reason else ""
