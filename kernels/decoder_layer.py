"""One decoder layer of the Llama kind over a few rows on a CPU, its cache included, in one call.

A layer of transformers is some fifty operators in a dozen modules. For a handful of rows through a
small model to call them takes as long as the products themselves.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from specdec.kernels.block_linear import MOST_ROWS
from specdec.kernels.native import library, why_not
from specdec.kernels.rms_norm import rms_norm
from specdec.kernels.weight_blocks import BlockWeight, from_blocks

IMPLEMENTATIONS = ("reference", "native")
WIDTHS = 32  # a head's width is a multiple of it
_SOURCE = Path(__file__).with_suffix(".c")


class Norm(NamedTuple):
    """The arguments of `rms_norm` beside its rows."""

    weight: Tensor
    eps: float
    offset: float = 0.0


class Product(NamedTuple):
    """A linear layer: the weight ``[N, K]`` in blocks, and the bias ``[N]`` float32 or None."""

    weight: BlockWeight
    bias: Tensor | None = None


class LayerParts(NamedTuple):
    """What a layer is made of: H hidden numbers, Hq query heads and Hkv others of D, I inner ones.

    Attributes:
        joined: ``[(Hq + 2 Hkv) * D, H]``: queries, keys and values.
        output: ``[H, Hq * D]``.
        gates: ``[2 I, H]``: gate and up.
        down: ``[H, I]``.
        before: the norm of what goes into the attention.
        between: the norm of what goes into the gates.
        width: D, a multiple of 32.
        scale: of the scores.
        query_norm: of single heads, before they are rotated; None for none.
        key_norm: as `query_norm`, and there if that is, with equal eps and offset.
    """

    joined: Product
    output: Product
    gates: Product
    down: Product
    before: Norm
    between: Norm
    width: int
    scale: float
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    @property
    def query_heads(self) -> int:
        """Hq."""
        return self.output.weight.num_inputs // self.width

    @property
    def heads(self) -> int:
        """Hkv."""
        return (self.joined.weight.num_outputs // self.width - self.query_heads) // 2


class DecoderLayer:
    """A layer, laid out for the C code once.

    Source: Llama (arXiv 2302.13971); rotary embeddings as in transformers, the two halves of a head
    as pairs.

    Args:
        parts: float32 on the CPU; they are neither copied nor written to.

    Raises:
        ValueError: if they do not fit together.
    """

    def __init__(self, parts: LayerParts) -> None:
        _check_parts(parts)
        self.parts = parts
        norms = parts.query_norm, parts.key_norm
        self._head_weights = [None if norm is None else norm.weight.data_ptr() for norm in norms]
        head_norm = parts.query_norm or Norm(parts.before.weight, 0.0)
        self._layer = _Layer(
            *map(_product, (parts.joined, parts.output, parts.gates, parts.down)),
            parts.before.weight.data_ptr(),
            parts.between.weight.data_ptr(),
            *self._head_weights,
            parts.before.eps,
            head_norm.eps,
            parts.before.offset,
            head_norm.offset,
            parts.scale,
            parts.query_heads,
            parts.heads,
            parts.width,
        )

    def run(
        self,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        starts: Sequence[int],
        mask: Tensor | None,
        *,
        visible: int | None = None,
        impl: str = "native",
    ) -> Tensor:
        """Returns what the layer makes of nodes behind what its cache holds; writes theirs to it.

        With "native" what comes out of a node is the same bits for any number of other nodes, in
        its row and in others, wherever those stand in the cache that it does not see.

        Args:
            rows: ``[B, N, H]`` float32, as all that follows; "native" takes B * N up to 128.
            cos: ``[B or 1, N, D]``.
            sin: ``[B or 1, N, D]``.
            keys: ``[B, Hkv, S, D]``, written to; slots of a head lie side by side.
            values: ``[B, Hkv, S, D]``, as `keys`, written to.
            starts: B slots, of each row's first node; the others stand behind it.
            mask: ``[B or 1, 1, N, visible or more]``, added to the scores; None where every node
                sees all slots.
            visible: slots that are looked at, S if None.
            impl: "reference", or "native": C, compiled when it is first called.

        Returns:
            ``[B, N, H]`` float32.

        Raises:
            ValueError: if shapes, dtypes or strides do not fit, or a slot is not there.
            NativeError: if "native" is asked for and C code cannot be had here.
        """
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"decoder_layer: impl must be one of {IMPLEMENTATIONS}; got {impl!r}")
        visible = keys.shape[2] if visible is None else visible
        _check_call(self.parts, rows, (cos, sin), (keys, values), starts, mask, visible)
        if impl == "reference":
            return _reference(self.parts, rows, (cos, sin), (keys, values), starts, mask, visible)
        batch, nodes, _ = rows.shape
        rows = rows.contiguous()
        first = array("q", starts)
        call = _Pass(
            cos.data_ptr(),
            sin.data_ptr(),
            None if mask is None else mask.data_ptr(),
            first.buffer_info()[0],
            batch,
            nodes,
            visible,
            nodes * self.parts.width if len(cos) > 1 else 0,
            0 if mask is None or len(mask) == 1 else mask.stride(0),
            0 if mask is None else mask.stride(2),
            keys.stride(0),
            keys.stride(1),
            torch.get_num_threads(),
        )
        room, run = _functions()
        work = torch.empty(room(self._layer, call))
        output = torch.empty_like(rows)
        run(
            self._layer,
            call,
            rows.data_ptr(),
            output.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            work.data_ptr(),
        )
        return output


def why_not_native() -> str | None:
    """Returns why "native" cannot be had here, None if it can; compiles it on the way."""
    return why_not(_SOURCE)


def _check_parts(parts: LayerParts) -> None:
    hidden, width = parts.joined.weight.num_inputs, parts.width
    inner, attended = parts.down.weight.num_inputs, parts.output.weight.num_inputs
    heads = parts.query_heads, parts.heads
    norms = [(parts.before, hidden), (parts.between, hidden)]
    norms += [(norm, width) for norm in (parts.query_norm, parts.key_norm) if norm is not None]
    products = (parts.joined, parts.output, parts.gates, parts.down)
    outputs = ((heads[0] + 2 * heads[1]) * width, hidden, 2 * inner, hidden)
    fits = (
        width % WIDTHS == 0
        and attended == heads[0] * width
        and min(heads) > 0
        and heads[0] % heads[1] == 0
        and parts.gates.weight.num_inputs == hidden
        and all(p.weight.num_outputs == n for p, n in zip(products, outputs, strict=True))
        and all(_is_plain(norm.weight, (size,)) for norm, size in norms)
        and all(p.bias is None or _is_plain(p.bias, (p.weight.num_outputs,)) for p in products)
        and parts.before[1:] == parts.between[1:]
        and len(norms) in (2, 4)
        and len({norm[1:] for norm, _ in norms[2:]}) <= 1
    )
    if not fits:
        shapes = [(p.weight.num_outputs, p.weight.num_inputs) for p in products]
        raise ValueError(
            f"a decoder layer takes heads of a multiple of {WIDTHS}, norms alike, and products "
            "[(Hq + 2 Hkv) * D, H], [H, Hq * D], [2 I, H] and [H, I], all float32 on the CPU; got "
            f"D = {width} and {shapes}"
        )


def _check_call(
    parts: LayerParts,
    rows: Tensor,
    angles: tuple[Tensor, Tensor],
    cached: tuple[Tensor, Tensor],
    starts: Sequence[int],
    mask: Tensor | None,
    visible: int,
) -> None:
    batch, nodes, hidden = rows.shape
    (keys, values), width = cached, parts.width
    tensors = (rows, *angles, *cached) if mask is None else (rows, *angles, *cached, mask)
    fits = (
        all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and hidden == parts.joined.weight.num_inputs
        and 0 < batch * nodes <= MOST_ROWS
        and keys.shape == values.shape == (batch, parts.heads, keys.shape[2], width)
        and keys.stride() == values.stride()
        and keys.stride()[2:] == (width, 1)
        and all(angle.shape in ((batch, nodes, width), (1, nodes, width)) for angle in angles)
        and all(angle.is_contiguous() for angle in angles)
        and angles[0].shape == angles[1].shape
    )
    if fits and mask is not None:
        fits = (
            mask.shape[:3] in ((batch, 1, nodes), (1, 1, nodes))
            and mask.shape[3] >= visible
            and mask.stride(3) == 1
        )
    if not fits:
        told = ", ".join(f"{list(tensor.shape)} {tensor.dtype}" for tensor in tensors)
        raise ValueError(
            f"a decoder layer takes float32 on the CPU: up to {MOST_ROWS} rows [B, N, H], cos and "
            f"sin [B or 1, N, D], keys and values [B, Hkv, S, D] of equal strides, and a mask "
            f"[B or 1, 1, N, {visible} or more]; got {told}"
        )
    if len(starts) != batch or min(starts) < 0 or max(starts) + nodes > visible:
        raise ValueError(f"{nodes} nodes from slots {list(starts)} are not among {visible} slots")
    if visible > keys.shape[2]:
        raise ValueError(f"the cache has {keys.shape[2]} slots, {visible} are to be looked at")


def _is_plain(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    plain = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    return plain and tensor.shape == shape and tensor.is_contiguous()


def _reference(
    parts: LayerParts,
    rows: Tensor,
    angles: tuple[Tensor, Tensor],
    cached: tuple[Tensor, Tensor],
    starts: Sequence[int],
    mask: Tensor | None,
    visible: int,
) -> Tensor:
    batch, nodes, _ = rows.shape
    heads = _times(_normed(rows, parts.before), parts.joined).view(batch, nodes, -1, parts.width)
    counts = [parts.query_heads, parts.heads, parts.heads]
    query, key, value = torch.split(heads, counts, dim=2)
    query = _rotated(_normed(query, parts.query_norm), angles)
    key = _rotated(_normed(key, parts.key_norm), angles)
    for row, start in enumerate(starts):
        for cache, new in zip(cached, (key, value), strict=True):
            cache[row, :, start : start + nodes] = new[row].transpose(0, 1)
    keys, values = (cache[:, :, :visible] for cache in cached)
    attended = scaled_dot_product_attention(
        query.transpose(1, 2),
        keys,
        values,
        None if mask is None else mask[..., :visible],
        scale=parts.scale,
        enable_gqa=True,
    )
    rows = rows + _times(attended.transpose(1, 2).flatten(2), parts.output)
    gate, up = _times(_normed(rows, parts.between), parts.gates).chunk(2, dim=-1)
    return rows + _times(silu(gate) * up, parts.down)


def _times(rows: Tensor, product: Product) -> Tensor:
    return linear(rows, from_blocks(product.weight), product.bias)


def _normed(rows: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return rows
    return rms_norm(rows, norm.weight, eps=norm.eps, offset=norm.offset, impl="reference")


def _rotated(heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Returns ``[B, N, heads, D]`` rotated."""
    cos, sin = (angle.unsqueeze(2) for angle in angles)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
        ("form", ctypes.c_int),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Product) for name in ("joined", "output", "gates", "down")),
        *((name, ctypes.c_void_p) for name in ("before", "between", "query_norm", "key_norm")),
        *((n, ctypes.c_float) for n in ("eps", "head_eps", "offset", "head_offset", "scale")),
        *((name, ctypes.c_int64) for name in ("query_heads", "heads", "width")),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "mask", "starts")),
        *((name, ctypes.c_int64) for name in ("batch", "nodes", "visible")),
        *((name, ctypes.c_int64) for name in ("angle_stride", "mask_stride", "mask_line")),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride")),
        ("threads", ctypes.c_int),
    )


def _product(product: Product) -> _Product:
    weight, bias = product
    return _Product(
        weight.data.data_ptr(),
        None if bias is None else bias.data_ptr(),
        weight.num_inputs,
        weight.num_outputs,
        weight.form.value,
    )


@functools.cache
def _functions() -> tuple[Any, Any]:
    """Returns `decoder_layer_room` and `decoder_layer` of the C code."""
    loaded: Any = library(_SOURCE)
    structures = [ctypes.POINTER(_Layer), ctypes.POINTER(_Pass)]
    loaded.decoder_layer_room.argtypes = structures
    loaded.decoder_layer_room.restype = ctypes.c_int64
    loaded.decoder_layer.argtypes = [*structures, *[ctypes.c_void_p] * 5]
    loaded.decoder_layer.restype = None
    return loaded.decoder_layer_room, loaded.decoder_layer
