"""How C code reads a decoder: its structures, field by field."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from specdec.kernels.layer_parts import Ends, LayerParts, Norm, Product


class ProductStruct(ctypes.Structure):
    """`struct product`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
        ("form", ctypes.c_int),
    )


class LayerStruct(ctypes.Structure):
    """`struct layer`."""

    _fields_ = (
        *((name, ProductStruct) for name in ("joined", "output", "gates", "down")),
        *((name, ctypes.c_void_p) for name in ("before", "between", "query_norm", "key_norm")),
        *((n, ctypes.c_float) for n in ("eps", "head_eps", "offset", "head_offset", "scale")),
        *((name, ctypes.c_int64) for name in ("query_heads", "heads", "width")),
    )


class PassStruct(ctypes.Structure):
    """`struct pass`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "places", "mask", "starts")),
        *((name, ctypes.c_int64) for name in ("batch", "nodes", "visible")),
        *((name, ctypes.c_int64) for name in ("angle_stride", "place_stride")),
        *((name, ctypes.c_int64) for name in ("mask_stride", "mask_line")),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride")),
        ("threads", ctypes.c_int),
    )


class EndsStruct(ctypes.Structure):
    """`struct ends`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("embedding", "norm")),
        ("head", ctypes.POINTER(ProductStruct)),
        ("vocabulary", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("eps", "offset")),
    )


class NodesStruct(ctypes.Structure):
    """`struct nodes`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "ancestors", "wanted")),
        *((name, ctypes.c_int64) for name in ("tree", "count", "window", "angles")),
        *((name, ctypes.c_void_p) for name in ("top_logits", "top_ids")),
        ("top_k", ctypes.c_int64),
    )


def layer_structs(layers: Sequence[LayerParts]) -> ctypes.Array[LayerStruct]:
    """Returns the layers side by side; their weights must outlive it."""
    return (LayerStruct * len(layers))(*map(_layer, layers))


def ends_struct(ends: Ends) -> EndsStruct:
    """Returns what stands around layers; its weights must outlive it."""
    head = None if ends.head is None else ctypes.pointer(_product(ends.head))
    return EndsStruct(
        ends.embedding.data_ptr(),
        ends.norm.weight.data_ptr(),
        head,
        len(ends.embedding),
        ends.norm.eps,
        ends.norm.offset,
    )


def _layer(parts: LayerParts) -> LayerStruct:
    head_weights = [n and n.weight.data_ptr() for n in (parts.query_norm, parts.key_norm)]
    head_norm = parts.query_norm or Norm(parts.before.weight, 0.0)
    return LayerStruct(
        *map(_product, (parts.joined, parts.output, parts.gates, parts.down)),
        parts.before.weight.data_ptr(),
        parts.between.weight.data_ptr(),
        *head_weights,
        parts.before.eps,
        head_norm.eps,
        parts.before.offset,
        head_norm.offset,
        parts.scale,
        parts.query_heads,
        parts.heads,
        parts.width,
    )


def _product(product: Product) -> ProductStruct:
    weight, bias = product
    return ProductStruct(
        weight.data.data_ptr(),
        None if bias is None else bias.data_ptr(),
        weight.num_inputs,
        weight.num_outputs,
        weight.form.value,
    )
