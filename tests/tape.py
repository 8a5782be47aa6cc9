"""A CUDA graph without CUDA: records the operations of a pass and repeats them, not its Python.

What the recorded function looked up on the host is frozen, its outputs lie where they lay, and the
next repetition writes over them: what a graph would get wrong, this gets wrong too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from specdec.backend.recorders import Recording


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, output))
        return output


class Tape:
    """Records as `CudaGraphs` does.

    Attributes:
        made: tapes that were ever made.
        recorded: functions that this one recorded.
        replayed: how often any of them was repeated.
    """

    made: ClassVar[list[Tape]] = []

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        Tape.made.append(self)

    def record(self, run: Callable[[], Any]) -> Recording:
        recorded = _Recorded()
        with recorded:
            outputs = run()
        self.recorded += 1
        kept = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        for leaf in kept:  # a graph that is captured has computed nothing yet
            leaf.fill_(torch.nan)

        def replay() -> None:
            now: dict[int, Tensor] = {}

            def current(leaf: Any) -> Any:
                return now.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

            for func, args, kwargs, output in recorded.steps:
                again = func(*tree_map(current, args), **tree_map(current, kwargs))
                for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        now[id(old)] = new
            for leaf in kept:
                leaf.copy_(now[id(leaf)])
            self.replayed += 1

        return Recording(outputs, replay)
