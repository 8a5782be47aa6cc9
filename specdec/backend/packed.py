"""The linear layers of a float32 model on a CPU, run from packed weights during our passes only."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from specdec.backend.fused_layers import FusedLayer, Products, fused_layers
from specdec.backend.linear_formats import FORMATS, PackedWeight, reason_against
from specdec.backend.norms import NativeNorm, StandIn, native_norms
from specdec.backend.shared_inputs import shared_inputs
from specdec.errors import ConfigError
from specdec.kernels.block_linear import block_linear
from specdec.kernels.layer_parts import Product
from specdec.kernels.weight_blocks import first_outputs

_SMALLEST = 1 << 16  # entries of a weight below which a call costs more than its products
_TIMED_ROWS = (1, 4, 8, 16)
_TIMED_BYTES = 64 << 20  # of weights of one shape, in turn: the caches must not hold them all
_REPEATS = 5
_MANY_ROWS, _MANY_OUTPUTS, _MANY_REPEATS = 256, 1 << 15, 3  # of a prompt
_TIE = 1.1  # within which a packed layout is taken before `linear`, so that noise seldom decides
_TOLERANCE = 1e-5  # of a packed product, relative to the largest one
_SHARE_OF_MEMORY = 0.5  # of what is free, that packed weights may take unasked


class PackedLinears:
    """Packed copies of a model's linear layers, put in place of their `forward` by `active`.

    Layers that are handed the same tensor (queries, keys and values; gate and up) become one
    product. A layer is left alone if it is no plain `torch.nn.Linear` of float32 on a CPU, or if
    someone else has replaced its `forward` (accelerate's offloading, for one).

    RMS norms run as one call each beside them (`specdec.backend.norms`), and so do whole decoder
    layers of the Llama kind whose products are in blocks (`specdec.backend.fused_layers`).

    The model is as it was found outside `active`. Weights that were written to or replaced since
    (an adapter merged, a checkpoint loaded) are noticed by `refresh`.

    Args:
        model: a HuggingFace model.
        form: a name in `linear_formats.FORMATS`, or "auto": for each shape the fastest in a short
            measurement, `linear` included.
    """

    def __init__(self, model: nn.Module, form: str) -> None:
        self.form = form
        self._lock = threading.Lock()
        self._users = 0
        joined = (_Group(members) for members in shared_inputs(model, _packable(model)))
        self._groups = [group for group in joined if group.num_entries >= _SMALLEST]
        self._norms = native_norms(model)
        self._modules = [module for module in model.modules() if module is not model]
        self._chosen: dict[tuple[int, int], str | None] = {}
        self._for_prompts: dict[tuple[int, int], bool] = {}
        self._fused: list[FusedLayer] = []
        self._stand_ins: list[StandIn] = []
        self._placed: list[StandIn] = []
        self.refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, beside the model's own."""
        return sum(group.packed.nbytes for group in self._groups if group.packed is not None)

    @property
    def formats(self) -> dict[str, int]:
        """How many layers run in each layout; "linear" are those measured not to gain."""
        count: dict[str, int] = {}
        for group in self._groups:
            name = "linear" if group.packed is None else group.packed.layout
            count[name] = count.get(name, 0) + len(group.members)
        return count

    @property
    def for_prompts(self) -> bool:
        """Whether all layers run from packed weights for the many rows of a prompt too."""
        return all(group.for_prompts for group in self._groups)

    @property
    def fused(self) -> list[FusedLayer]:
        """Decoder layers that run as one call; another list when they have been found anew."""
        return self._fused

    def product_of(self, module: nn.Module) -> Product | None:
        """Returns a linear layer in blocks, if it is packed so, and alone."""
        of_module = {group.members[0]: group for group in self._groups if len(group.members) == 1}
        packed = of_module[module].packed if module in of_module else None
        return None if packed is None else packed.product

    def norm_of(self, module: nn.Module) -> NativeNorm | None:
        """Returns what computes a norm in one call, if it can be."""
        return next((norm for norm in self._norms if norm.module is module), None)

    @property
    def forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        """What runs in place of modules' `forward` in a pass of ours."""
        return dict(self._stand_ins)

    def refresh(self) -> None:
        """Packs what was not packed yet, or has changed since."""
        stale = [group for group in self._groups if group.is_stale()]
        for shape in {group.shape for group in stale} - self._chosen.keys():
            alike = [group for group in stale if group.shape == shape]
            self._chosen[shape] = _fastest(alike) if self.form == "auto" else self.form
        for group in stale:
            group.pack(self._chosen[group.shape])
            if group.shape not in self._for_prompts and group.packed is not None:
                self._for_prompts[group.shape] = group.is_faster_for_many()
            group.for_prompts = self._for_prompts.get(group.shape, True)
        if stale or not self._stand_ins or any(layer.found.moved for layer in self._fused):
            products: Products = {tuple(group.members): group.packed for group in self._groups}
            self._fused = fused_layers(self._modules, products, self._norms)
            self._stand_ins = [
                *(own for group in self._groups for own in group.stand_ins()),
                *(norm.stand_in() for norm in self._norms),
                *(layer.stand_in() for layer in self._fused),
            ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Puts the packed products in place; several users at once are counted."""
        if torch.is_autocast_enabled("cpu"):
            yield
            return
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._placed = self._stand_ins
                for module, forward in self._placed:
                    module.__dict__["forward"] = forward
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    for module, forward in self._placed:
                        if module.__dict__.get("forward") is forward:
                            del module.__dict__["forward"]
                    for group in self._groups:
                        group.forget()


_known: WeakKeyDictionary[nn.Module, ref[PackedLinears]] = WeakKeyDictionary()


def packed_linears(model: Any, form: str | None = "auto") -> PackedLinears | None:
    """Returns a model's packed layers, shared by all who ask for them; None if there are none.

    Args:
        model: a HuggingFace model.
        form: "auto", the name of a format, or None for the model's own layers.

    Raises:
        ConfigError: for an unknown format, or one that cannot be had here.
    """
    if form is not None and form != "auto" and form not in FORMATS:
        raise ConfigError(
            f"packed_weights must be 'auto', None, or one of {', '.join(map(repr, FORMATS))}; "
            f"got {form!r}"
        )
    if form is None or not isinstance(model, nn.Module):
        return None
    if form != "auto" and FORMATS[form](torch.eye(16), None) is None:
        raise ConfigError(f"packed_weights={form!r} cannot be had here{reason_against(form)}")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        return None  # the compiler has taken the layers over
    known = already_packed(model)
    if known is not None and known.form == form:
        return known
    total = sum(module.weight.nbytes for module in _packable(model))
    if total < _SMALLEST * 4:
        return None
    if form == "auto" and total > _SHARE_OF_MEMORY * psutil.virtual_memory().available:
        return None
    made = PackedLinears(model, form)
    _known[model] = ref(made)
    return made


def already_packed(model: Any) -> PackedLinears | None:
    """Returns a model's packed layers if someone uses them; for others who run its layers."""
    known = _known.get(model)
    return None if known is None else known()


@dataclass(eq=False)
class _Group:
    """Layers that are handed the same tensor: one product, cut into their outputs."""

    members: list[nn.Linear]
    packed: PackedWeight | None = None
    for_prompts: bool = True  # whether it serves more rows than trees have
    _seen: list[tuple[int, int]] = field(default_factory=list)
    _input: Tensor | None = None
    _outputs: tuple[Tensor, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the joined weight."""
        return sum(m.out_features for m in self.members), self.members[0].in_features

    @property
    def num_entries(self) -> int:
        """Entries of the joined weight."""
        return sum(m.weight.numel() for m in self.members)

    def is_stale(self) -> bool:
        """Returns whether a weight is another than the one that was packed."""
        return self._seen != self._versions()

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Returns the joined weight and bias."""
        weights = [m.weight.detach() for m in self.members]
        biases = [m.bias.detach() for m in self.members if m.bias is not None]
        if len(weights) == 1:
            return weights[0].contiguous(), biases[0] if biases else None
        return torch.cat(weights), torch.cat(biases) if biases else None

    def pack(self, form: str | None) -> None:
        """Packs the weights as they are now; to None where the format cannot hold them."""
        self._seen = self._versions()
        self.packed = None
        if form is not None and all(_is_packable(m) for m in self.members):
            weight, bias = self.weights()
            packed = FORMATS[form](weight, bias)
            self.packed = packed if packed is not None and _agrees(packed, weight, bias) else None

    def stand_ins(self) -> list[StandIn]:
        """Returns what runs in place of the layers' `forward`; nothing if they stay as they are."""
        if self.packed is None:
            return []
        first, *others = self.members
        if not others:
            return [(first, partial(self._alone, first))]
        later = [(m, partial(self._later, m, place)) for place, m in enumerate(others, start=1)]
        return [(first, partial(self._first, first)), *later]

    def forget(self) -> None:
        """Drops the tensors of a pass that ended before all layers were called."""
        self._input, self._outputs = None, ()

    def _alone(self, member: nn.Linear, rows: Tensor) -> Tensor:
        packed = self._for(rows)
        if packed is None:
            return linear(rows, member.weight, member.bias)
        return packed.run(rows)

    def _first(self, member: nn.Linear, rows: Tensor) -> Tensor:
        packed = self._for(rows)
        if packed is None:
            return linear(rows, member.weight, member.bias)
        sizes = [m.out_features for m in self.members]
        self._outputs = torch.split(packed.run(rows), sizes, dim=-1)
        self._input = rows
        return self._outputs[0]

    def _for(self, rows: Tensor) -> PackedWeight | None:
        """Returns the packed weight if it serves these rows."""
        packed = self.packed
        if packed is None or torch.is_grad_enabled():
            return None
        few = packed.most_rows is None or rows.numel() <= packed.most_rows * rows.shape[-1]
        return packed if few or self.for_prompts else None

    def is_faster_for_many(self) -> bool:
        """Returns whether the packed product is faster than `linear` for the rows of a prompt."""
        assert self.packed is not None
        if self.packed.product is None:
            return True
        # a vocabulary's outputs for so many rows would take a quarter of a gigabyte
        blocks = first_outputs(self.packed.product.weight, _MANY_OUTPUTS)
        weight = self.weights()[0][: blocks.num_outputs]
        rows = torch.ones(_MANY_ROWS, weight.shape[1])
        ways: list[Callable[[Tensor], Tensor]] = [
            partial(block_linear, weight=blocks),
            partial(linear, weight=weight),
        ]
        packed, own = (min([_seconds([way], rows) for _ in range(_MANY_REPEATS)]) for way in ways)
        return packed * _TIE < own

    def _later(self, member: nn.Linear, place: int, rows: Tensor) -> Tensor:
        if rows is not self._input:
            return linear(rows, member.weight, member.bias)
        output = self._outputs[place]
        if place == len(self.members) - 1:
            self._input, self._outputs = None, ()
        return output

    def _versions(self) -> list[tuple[int, int]]:
        tensors = [t for m in self.members for t in (m.weight, m.bias) if t is not None]
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _is_packable(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu"
    return plain and weight.dtype == torch.float32


def _packable(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear) and _is_packable(m)]


def _agrees(packed: PackedWeight, weight: Tensor, bias: Tensor | None) -> bool:
    """Returns whether a packed product is the product, for one row and for several."""
    rows = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    expected = linear(rows, weight, bias)
    bound = _TOLERANCE * float(expected.abs().max())
    return all(
        float((packed.run(rows[:count]) - expected[:count]).abs().max()) <= bound
        for count in (1, 5)
    )


def _fastest(groups: Sequence[_Group]) -> str | None:
    """Returns the format in which weights of one shape take least time, None for `linear`."""
    rows, columns = groups[0].shape
    sample = [group.weights() for group in groups[: 1 + _TIMED_BYTES // (4 * rows * columns)]]
    ways: dict[str | None, list[Callable[[Tensor], Tensor]]] = {
        None: [partial(linear, weight=weight, bias=bias) for weight, bias in sample]
    }
    for name, pack in FORMATS.items():
        packed = [pack(weight, bias) for weight, bias in sample]
        runs = [p.run for p in packed if p is not None]
        if len(runs) == len(sample):
            ways[name] = runs
    inputs = [torch.ones(count, groups[0].shape[1]) for count in _TIMED_ROWS]
    best: dict[str | None, list[float]] = dict.fromkeys(ways, [math.inf] * len(inputs))
    for _ in range(_REPEATS):
        for way, runs in ways.items():
            taken = [_seconds(runs, rows) for rows in inputs]
            best[way] = [min(a, b) for a, b in zip(best[way], taken, strict=True)]
    return min(best, key=lambda name: sum(best[name]) * (_TIE if name is None else 1.0))


def _seconds(runs: Sequence[Callable[[Tensor], Tensor]], rows: Tensor) -> float:
    begin = time.perf_counter()
    for run in runs:
        run(rows)
    return time.perf_counter() - begin
