"""Times tree attention beside torch's own, on the same tensors in the same run.

A verify pass reads the whole cache of a layer once; what a kernel takes is compared with the other
ways to get the same result, with attention that looks at no mask (the speed of light for torch's
kernels) and with a plain copy of as many bytes.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specdec.kernels.tree_attention import tree_attention
from specdec.kernels.tree_mask import ancestor_matrix, pack_ancestors, visible_slots

OURS = "specdec"
UNMASKED = "sdpa, no mask"  # another result: what no mask at all would cost
COPY = "copy"  # as many bytes as keys and values have
_INNER = 8  # calls between two looks at the clock


class Case(NamedTuple):
    """One shape.

    Attributes:
        batch_size: rows.
        num_heads: query heads.
        num_kv_heads: heads of keys and values.
        width: of a head.
        nodes: of each row's tree, the root included.
        context: tokens of each row before the tree.
        dtype: of all tensors.
    """

    batch_size: int
    num_heads: int
    num_kv_heads: int
    width: int
    nodes: int
    context: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, which any method must read."""
        slots = self.batch_size * self.num_kv_heads * (self.context + self.nodes)
        return 2 * slots * self.width * self.dtype.itemsize


class Timing(NamedTuple):
    """Seconds of a call: median, 20 % and 80 % quantile over the repeats."""

    median: float
    low: float
    high: float


class Inputs:
    """Tensors of a case: several caches, so that none is still in a cache of the chip.

    Args:
        case: the shape.
        device: where.
        rotate_bytes: of keys and values altogether, at least two caches.
    """

    def __init__(self, case: Case, device: torch.device, rotate_bytes: int) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            return values.to(case.dtype)

        self.case = case
        slots = case.context + case.nodes
        of_cache = (case.batch_size, case.num_kv_heads, slots, case.width)
        copies = max(2, math.ceil(rotate_bytes / case.nbytes))
        self.query = normal(case.batch_size, case.num_heads, case.nodes, case.width)
        self.caches = [(normal(*of_cache), normal(*of_cache)) for _ in range(copies)]
        # a binary tree: chains and siblings in one
        parents = [-1, *((node - 1) // 2 for node in range(1, case.nodes))]
        ancestors = ancestor_matrix(parents, case.nodes).expand(case.batch_size, -1, -1)
        self.ancestors = ancestors.to(device)
        self.words = pack_ancestors(ancestors).to(device)
        full = torch.full((case.batch_size,), case.context, dtype=torch.int32, device=device)
        self.lengths, self.nodes = full, torch.full_like(full, case.nodes)
        self.mask = visible_slots(self.words, self.lengths, self.nodes, slots).unsqueeze(1)


Method = Callable[[Tensor, Tensor], Tensor]


def methods_for(inputs: Inputs, *, flex: bool, impl: str = "auto") -> dict[str, Method]:
    """Returns the ways to attend, each a function of keys and values.

    Args:
        inputs: of one case.
        flex: whether FlexAttention, compiled, takes part: a minute and a compiler.
        impl: of `tree_attention`.
    """
    query, mask, case = inputs.query, inputs.mask, inputs.case
    groups = case.num_heads // case.num_kv_heads
    scale = case.width**-0.5

    def ours(key: Tensor, value: Tensor) -> Tensor:
        return tree_attention(
            query,
            key,
            value,
            inputs.words,
            inputs.lengths,
            inputs.nodes,
            scale=scale,
            impl=impl,
            check_values=False,
        )

    def as_transformers(key: Tensor, value: Tensor) -> Tensor:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    def grouped(key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )

    def unmasked(key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)

    found: dict[str, Method] = {
        OURS: ours,
        "sdpa, repeated heads": as_transformers,
        "sdpa, enable_gqa": grouped,
    }
    if flex:
        found["flex attention"] = _flex(inputs, scale)
    return found | {UNMASKED: unmasked}


def _flex(inputs: Inputs, scale: float) -> Method:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    ancestors, context, nodes = inputs.ancestors, inputs.case.context, inputs.case.nodes

    def visible(batch: Tensor, _head: Tensor, node: Tensor, slot: Tensor) -> Tensor:
        place = (slot - context).clamp(min=0)
        return (slot < context) | ancestors[batch, node, place]

    blocks = create_block_mask(
        visible, inputs.case.batch_size, None, nodes, context + nodes, device=inputs.query.device
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = compiled(
            inputs.query, key, value, block_mask=blocks, scale=scale, enable_gqa=True
        )
        return output

    return attend


def bandwidth_share(name: str, timing: Timing, copied: Timing) -> float:
    """Returns the bytes a second that a method must move at least, over those that a copy moves.

    A copy reads the cache and writes as much; attention reads it once.

    Args:
        name: of the method.
        timing: its own.
        copied: of `COPY` in the same run.
    """
    traffic = 1.0 if name == COPY else 0.5
    return traffic * copied.median / timing.median


@torch.inference_mode()
def time_case(inputs: Inputs, methods: dict[str, Method], repeats: int) -> dict[str, Timing]:
    """Returns the seconds of a call of each method, and of a copy of the cache.

    Methods take turns, so that a slow moment hits all. On a GPU a few calls are captured in a
    graph, so that what the host takes to launch them is not counted.

    Args:
        inputs: of one case.
        methods: of `methods_for`.
        repeats: rounds that count; one more warms up.
    """
    runs: dict[str, Callable[[], float]] = {
        name: _clocked(inputs, method) for name, method in (*methods.items(), (COPY, _copy(inputs)))
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats + 1):
        names = list(runs) if repeat % 2 else list(reversed(runs))
        for name in names:
            taken = runs[name]()
            if repeat:
                seconds[name].append(taken)
    return {name: _timing(seconds[name]) for name in runs}


def _copy(inputs: Inputs) -> Method:
    target = torch.empty_like(inputs.caches[0][0])

    def copy(key: Tensor, value: Tensor) -> Tensor:
        target.copy_(key)
        return target.copy_(value)

    return copy


def _clocked(inputs: Inputs, method: Method) -> Callable[[], float]:
    """Returns a function that runs a few calls and returns the seconds of one."""
    places = iter(range(10**9))

    def calls() -> None:
        for _ in range(_INNER):
            method(*inputs.caches[next(places) % len(inputs.caches)])

    if inputs.query.device.type != "cuda":

        def on_host() -> float:
            begin = time.perf_counter()
            calls()
            return (time.perf_counter() - begin) / _INNER

        return on_host

    calls()  # compiles what is compiled, which a capture must not see
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def on_device() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / _INNER

    return on_device


def _timing(seconds: Sequence[float]) -> Timing:
    low, median, high = np.quantile(seconds, [0.2, 0.5, 0.8]).tolist()
    return Timing(median, low, high)
