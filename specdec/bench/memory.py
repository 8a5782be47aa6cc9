"""What a method of generation adds to the memory of the process."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from specdec.bench.generation import Method

_PAUSE_S = 0.002  # between two looks at the process


def added_memory(make: Callable[[], Method], inputs: Any, **arguments: Any) -> int:
    """Returns the most bytes that a new method and one call of it hold beyond what was held before.

    Packed weights count in full, though all methods of a model share them, and so do cache, logits
    and a drafter's tables; the model's own weights do not. On a GPU it is the device's memory, else
    the process's resident memory, looked at now and then.

    Args:
        make: makes the method, which is closed again; another one of the model must have been made
            and be alive, for what is shared is looked up and not measured.
        inputs: of the call.
        **arguments: of `generate`.
    """
    device: torch.device = inputs["input_ids"].device
    with _watched(device) as peak:
        method = make()
        method.run(inputs, **arguments)
    if method.generator is None:
        return peak[0]
    packed = method.generator.packed_weights
    method.generator.close()
    return peak[0] + (0 if packed is None else packed["nbytes"])


@contextmanager
def _watched(device: torch.device) -> Iterator[list[int]]:
    """Yields a list that holds the bytes added at most, once the block is left."""
    _release()
    added = [0]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield added
        added[0] = torch.cuda.max_memory_allocated(device) - before
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(_PAUSE_S):
            added[0] = max(added[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield added
    finally:
        done.set()
        watcher.join()
        added[0] = max(added[0], process.memory_info().rss - before)


def _release() -> None:
    """Hands freed memory back to the system, or it would not be seen when it is taken again."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
