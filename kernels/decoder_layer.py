"""Decoder layers of the Llama kind over a few rows on a CPU, caches included, in one call.

A layer of transformers is some fifty operators in a dozen modules. For a handful of rows through a
small model to call them takes as long as the products themselves, and thirty calls of whole layers
still take a quarter of it.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.block_linear import MOST_ROWS, serves
from specdec.kernels.decoder_reference import layers_reference
from specdec.kernels.layer_parts import LayerCall, LayerParts, Product
from specdec.kernels.layer_structs import LayerStruct, PassStruct, layer_structs
from specdec.kernels.native import library, why_not

IMPLEMENTATIONS = ("reference", "native")
WIDTHS = 32  # a head's width is a multiple of it
SOURCE = Path(__file__).with_name("decoder.c")


class DecoderLayers:
    """Layers one behind the other, laid out for the C code once.

    Source: Llama (arXiv 2302.13971); rotary embeddings as in transformers, the two halves of a head
    as pairs.

    Args:
        layers: at least one, of one shape; float32 on the CPU. Nothing is copied or written to.

    Raises:
        ValueError: if their parts, or they, do not fit together.
    """

    def __init__(self, layers: Sequence[LayerParts]) -> None:
        for parts in layers:
            _check_parts(parts)
        if len({_shape(parts) for parts in layers}) != 1:
            raise ValueError(
                f"decoder layers that run together must be of one shape; got "
                f"{[_shape(parts) for parts in layers]}"
            )
        self.layers = tuple(layers)
        self.structs = layer_structs(layers)

    def run(self, call: LayerCall, *, impl: str = "native") -> Tensor:
        """Returns what the layers make of nodes behind what their caches hold; writes them there.

        With "native" what comes out of a node is the same bits for any number of other nodes, in
        its row and in others, wherever those stand in the cache that it does not see; and for any
        number of layers in a call.

        Args:
            call: nodes and caches; "native" takes B * N up to 128.
            impl: "reference", or "native": C, compiled when it is first called.

        Returns:
            ``[B, N, H]`` float32.

        Raises:
            ValueError: if shapes, dtypes or strides do not fit, or a slot is not there.
            NativeError: if "native" is asked for and C code cannot be had here.
        """
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"decoder_layer: impl must be one of {IMPLEMENTATIONS}; got {impl!r}")
        _check_call(self.layers, call)
        if impl == "reference":
            return layers_reference(self.layers, call)
        rows, mask = call.rows.contiguous(), call.mask
        batch, nodes, _ = rows.shape
        starts = array("q", call.starts)
        row_stride, head_stride = call.caches.strides
        shared = PassStruct(
            cos=call.cos.data_ptr(),
            sin=call.sin.data_ptr(),
            mask=None if mask is None else mask.data_ptr(),
            starts=starts.buffer_info()[0],
            batch=batch,
            nodes=nodes,
            visible=call.visible,
            angle_stride=nodes * self.layers[0].width if len(call.cos) > 1 else 0,
            mask_stride=0 if mask is None or len(mask) == 1 else mask.stride(0),
            mask_line=0 if mask is None else mask.stride(2),
            row_stride=row_stride,
            head_stride=head_stride,
            threads=torch.get_num_threads(),
        )
        room, run = _functions()
        work = torch.empty(room(self.structs, shared), dtype=torch.float32)
        output = torch.empty_like(rows)
        run(
            self.structs,
            len(self.layers),
            shared,
            rows.data_ptr(),
            output.data_ptr(),
            *(pointers.buffer_info()[0] for pointers in call.caches.pointers),
            work.data_ptr(),
        )
        return output


def why_not_native() -> str | None:
    """Returns why "native" cannot be had here, None if it can; compiles it on the way."""
    return why_not(SOURCE)


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
        and all(fits_product(p, p.weight.num_inputs) for p in products)
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


def _shape(parts: LayerParts) -> tuple[int, ...]:
    """Returns what layers that run together have in common."""
    weights = (parts.joined, parts.output, parts.gates, parts.down)
    sizes = [size for p in weights for size in (p.weight.num_outputs, p.weight.num_inputs)]
    return (*sizes, parts.width)


def _check_call(layers: Sequence[LayerParts], call: LayerCall) -> None:
    rows, cos, sin, caches, starts, mask, visible = call
    batch, nodes, hidden = rows.shape
    parts, width = layers[0], layers[0].width
    shape = caches.shape
    own = [t for t in (rows, cos, sin, mask) if t is not None]
    # one by one: behind a pass sets and generators take several times as long
    fits = (
        caches.fit
        and len(caches.keys) == len(layers)
        and shape == (batch, parts.heads, shape[2], width)
        and hidden == parts.joined.weight.num_inputs
        and 0 < batch * nodes <= MOST_ROWS
        and cos.shape == sin.shape
        and cos.shape in ((batch, nodes, width), (1, nodes, width))
        and cos.is_contiguous()
        and sin.is_contiguous()
    )
    for tensor in own:
        fits = fits and tensor.dtype is torch.float32 and tensor.is_cpu
    if fits and mask is not None:
        fits = (
            mask.shape[:3] in ((batch, 1, nodes), (1, 1, nodes))
            and mask.shape[3] >= visible
            and mask.stride(3) == 1
        )
    if not fits:
        tensors = (*own, *caches.keys, *caches.values)
        shapes = dict.fromkeys(f"{list(tensor.shape)} {tensor.dtype}" for tensor in tensors)
        told = ", ".join(shapes)
        raise ValueError(
            f"a decoder layer takes float32 on the CPU: up to {MOST_ROWS} rows [B, N, H], cos and "
            f"sin [B or 1, N, D], keys and values of {len(layers)} layers [B, Hkv, S, D] of equal "
            f"strides, and a mask "
            f"[B or 1, 1, N, {visible} or more]; got {told}"
        )
    if len(starts) != batch or min(starts) < 0 or max(starts) + nodes > visible:
        raise ValueError(f"{nodes} nodes from slots {list(starts)} are not among {visible} slots")
    if visible > shape[2]:
        raise ValueError(f"the cache has {shape[2]} slots, {visible} are to be looked at")


def fits_product(product: Product, num_inputs: int) -> bool:
    """Returns whether a product is of so many inputs, and weight and bias such as C code reads."""
    weight, bias = product
    plain = bias is None or _is_plain(bias, (weight.num_outputs,))
    return weight.num_inputs == num_inputs and plain and serves(weight.form)


def _is_plain(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    plain = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    return plain and tensor.shape == shape and tensor.is_contiguous()


@functools.cache
def _functions() -> tuple[Any, Any]:
    """Returns `decoder_layers_room` and `decoder_layers` of the C code."""
    loaded: Any = library(SOURCE)
    layers, shared = ctypes.POINTER(LayerStruct), ctypes.POINTER(PassStruct)
    loaded.decoder_layers_room.argtypes = [layers, shared]
    loaded.decoder_layers_room.restype = ctypes.c_int64
    loaded.decoder_layers.argtypes = [layers, ctypes.c_int64, shared, *[ctypes.c_void_p] * 5]
    loaded.decoder_layers.restype = None
    return loaded.decoder_layers_room, loaded.decoder_layers
