"""What records a pass once and repeats it without its Python: a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch


class Recording(NamedTuple):
    """A recorded function.

    Attributes:
        outputs: what the function returned; its tensors hold numbers after `replay` only.
        replay: does once more what was recorded: the same operations on the same addresses, with
            whatever the tensors hold by then, into the same outputs.
    """

    outputs: Any
    replay: Callable[[], None]


class Recorder(Protocol):
    """Records functions that read nothing on the host."""

    def record(self, run: Callable[[], Any]) -> Recording:
        """Returns the recording of a function that has run before, which warmed it up.

        Raises:
            RuntimeError: if it does what cannot be recorded.
        """


class CudaGraphs:
    """CUDA graphs on one device; they share their memory, since they never run at one time.

    Args:
        device: of all tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, run: Callable[[], Any]) -> Recording:
        """Captures a function; nothing is computed until the replay."""
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # what other threads allocate meanwhile is none of this graph's business
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = run()
        return Recording(outputs, graph.replay)
