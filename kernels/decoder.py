"""A decoder of the Llama kind over a few rows on a CPU: token ids in, logits out, in one call.

Around the layers there is little to compute, but behind a pass, which leaves nothing else in the
caches, each operator takes some ten microseconds for it: of a small model's pass a twentieth.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from specdec.kernels.block_linear import MOST_ROWS
from specdec.kernels.decoded import Decoded, Selected
from specdec.kernels.decoder_layer import IMPLEMENTATIONS, SOURCE, DecoderLayers, fits_product
from specdec.kernels.decoder_reference import decoder_reference
from specdec.kernels.layer_parts import DecoderCall, Ends, LayerParts
from specdec.kernels.layer_structs import (
    EndsStruct,
    LayerStruct,
    NodesStruct,
    PassStruct,
    ends_struct,
)
from specdec.kernels.native import library
from specdec.kernels.top_k_rows import MOST_NATIVE

_NO_TOKEN, _NO_ANGLES = 1, 2  # as in decoder.c


class Decoder:
    """Layers, and what stands around them, laid out for the C code once.

    Args:
        layers: as `DecoderLayers` takes them.
        ends: float32 on the CPU. Nothing is copied or written to.

    Attributes:
        layers: as C code reads them.
        ends: as given.
        end_structs: these, as C code reads them.
        width: logits of a node, or without a head what would go into it.

    Raises:
        ValueError: if the parts do not fit together.
    """

    def __init__(self, layers: Sequence[LayerParts], ends: Ends) -> None:
        self.layers = DecoderLayers(layers)
        self.ends = ends
        hidden = layers[0].joined.weight.num_inputs
        tensors = (ends.embedding, ends.norm.weight)
        plain = all(t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in tensors)
        fits = ends.embedding.shape[1:] == ends.norm.weight.shape == (hidden,)
        if not plain or not fits or (ends.head and not fits_product(ends.head, hidden)):
            raise ValueError(
                f"a decoder takes an embedding [V, {hidden}], a norm [{hidden}] and a head "
                f"[V', {hidden}], all float32 on the CPU; got {[list(t.shape) for t in tensors]}"
            )
        self.width = hidden if ends.head is None else ends.head.weight.num_outputs
        self.end_structs = ends_struct(ends)

    @property
    def most_selected(self) -> int:
        """The largest `DecoderCall.top_k`; 0 without a head."""
        return 0 if self.ends.head is None else min(MOST_NATIVE, self.width)

    def run(self, call: DecoderCall, *, impl: str = "native") -> Decoded:
        """Returns logits, or without a head what would go into it; writes the caches.

        With "native" the bits of a node are its own, as of `DecoderLayers.run`.

        Args:
            call: nodes and caches; "native" takes B * N up to 128.
            impl: "reference", or "native": C, compiled when it is first called.

        Raises:
            IndexError: if a token is not in the vocabulary.
            ValueError: if shapes, dtypes or strides do not fit, more is to be selected than can be,
                or a slot or an angle is not there.
            NativeError: if "native" is asked for and C code cannot be had here.
        """
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"decoder: impl must be one of {IMPLEMENTATIONS}; got {impl!r}")
        _check(self.layers.layers[0], len(self.layers.layers), call)
        if not 0 <= call.top_k <= self.most_selected:
            raise ValueError(f"top_k must be 0 to {self.most_selected} here; got {call.top_k}")
        if impl == "reference":
            return decoder_reference(self.ends, self.layers.layers, call)
        tokens, positions = call.tokens.contiguous(), call.positions.contiguous()
        ancestors = None if call.ancestors is None else call.ancestors.contiguous()
        keep = None if call.keep is None else call.keep.contiguous()
        batch, nodes = tokens.shape
        count = nodes if keep is None else len(keep)
        by_position = call.cos.dim() == 2
        starts = array("q", call.starts)
        row_stride, head_stride = call.caches.strides
        shared = PassStruct(
            cos=call.cos.data_ptr(),
            sin=call.sin.data_ptr(),
            starts=starts.buffer_info()[0],
            batch=batch,
            nodes=nodes,
            visible=call.visible,
            angle_stride=0 if len(call.cos) == 1 else nodes * self.layers.layers[0].width,
            row_stride=row_stride,
            head_stride=head_stride,
            threads=torch.get_num_threads(),
        )
        top = Selected(batch, count, call.top_k) if call.top_k else None
        made = Decoded(torch.empty(batch, count, self.width, dtype=torch.float32), top)
        asked = NodesStruct(
            tokens=tokens.data_ptr(),
            positions=positions.data_ptr(),
            ancestors=None if ancestors is None else ancestors.data_ptr(),
            wanted=None if keep is None else keep.data_ptr(),
            tree=positions.shape[1],
            count=count,
            window=call.window or 0,
            angles=len(call.cos) if by_position else 0,
            top_logits=None if top is None else top.logits.data_ptr(),
            top_ids=None if top is None else top.ids.data_ptr(),
            top_k=call.top_k,
        )
        room, run = native_functions()
        size = room(self.layers.structs, shared, asked)
        work = torch.empty(size, dtype=torch.float32)
        failed = run(
            self.layers.structs,
            len(self.layers.layers),
            self.end_structs,
            shared,
            asked,
            made.logits.data_ptr(),
            *(pointers.buffer_info()[0] for pointers in call.caches.pointers),
            work.data_ptr(),
        )
        if failed == _NO_TOKEN:
            raise IndexError(
                f"token ids must be from 0 to below {len(self.ends.embedding)}, the vocabulary; "
                f"got {int(tokens.min())} to {int(tokens.max())}"
            )
        if failed == _NO_ANGLES:
            raise ValueError(
                f"there are angles for {len(call.cos)} positions; got {int(positions.min())} to "
                f"{int(positions.max())}"
            )
        return made


def _check(parts: LayerParts, num_layers: int, call: DecoderCall) -> None:
    tokens, positions, ancestors, _, cos, sin, caches, starts, visible, keep, _ = call
    batch, nodes = tokens.shape
    shape, tree = caches.shape, positions.shape[1]
    # one by one: behind a pass sets and generators take several times as long
    fits = (
        caches.fit
        and len(caches.keys) == num_layers
        and shape == (batch, parts.heads, shape[2], parts.width)
        and 0 < batch * nodes <= MOST_ROWS
        and tokens.dtype is torch.int64
        and positions.dtype is torch.int64
        and len(positions) == batch
        and tree >= nodes
        and cos.shape == sin.shape
        and len(cos) > 0
        and cos.dtype is torch.float32
        and sin.dtype is torch.float32
        and cos.is_contiguous()
        and sin.is_contiguous()
        and (cos.dim() == 2 or cos.shape[:2] in ((batch, nodes), (1, nodes)))
        and cos.shape[-1] == parts.width
    )
    for tensor in (tokens, positions, ancestors, cos, sin):
        fits = fits and (tensor is None or tensor.is_cpu)
    if ancestors is not None:
        fits = fits and ancestors.dtype is torch.bool and ancestors.shape == (batch, nodes, tree)
    if not fits:
        told = None if ancestors is None else list(ancestors.shape)
        raise ValueError(
            f"a decoder takes up to {MOST_ROWS} tokens [B, N] and positions [B, M] int64, "
            f"ancestors [B, N, M] bool, cos and sin [P, D] or [B or 1, N, D] float32, caches of "
            f"{num_layers} layers [B, Hkv, S, D]; got {list(tokens.shape)}, "
            f"{list(positions.shape)}, {told}, {list(cos.shape)} and {list(shape)}"
        )
    if len(starts) != batch or min(starts) < tree - nodes or max(starts) + nodes > visible:
        raise ValueError(f"{nodes} nodes from slots {list(starts)} are not among {visible} slots")
    if visible > shape[2]:
        raise ValueError(f"the cache has {shape[2]} slots, {visible} are to be looked at")
    if keep is None:
        return
    fits = keep.dtype is torch.int64 and keep.is_cpu and keep.dim() == 1 and 0 < len(keep) <= nodes
    if not fits or int(keep.min()) < 0 or int(keep.max()) >= nodes:
        raise ValueError(f"keep must name some of {nodes} nodes, int64 on the CPU; got {keep}")


@functools.cache
def native_functions() -> tuple[Any, Any]:
    """Returns `decoder_room` and `decoder` of the C code.

    Raises:
        NativeError: if it cannot be had here.
    """
    loaded: Any = library(SOURCE)
    layers, shared = ctypes.POINTER(LayerStruct), ctypes.POINTER(PassStruct)
    ends, nodes = ctypes.POINTER(EndsStruct), ctypes.POINTER(NodesStruct)
    loaded.decoder_room.argtypes = [layers, shared, nodes]
    loaded.decoder_room.restype = ctypes.c_int64
    rest = [ctypes.c_void_p] * 4
    loaded.decoder.argtypes = [layers, ctypes.c_int64, ends, shared, nodes, *rest]
    loaded.decoder.restype = ctypes.c_int
    return loaded.decoder_room, loaded.decoder
