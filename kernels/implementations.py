"""Which implementation of an operation runs: the caller's choice, or what fits the tensors."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)


@functools.cache
def has_triton() -> bool:
    """Returns whether the package triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Returns whether Triton kernels run in its interpreter (TRITON_INTERPRET=1), on any device.

    Triton decides this where a kernel is defined, so the variable must be set before the first
    call, not later.
    """
    if not has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def resolve(
    impl: str, operation: str, names: Sequence[str], tensor: Tensor, *, fast: bool = True
) -> str:
    """Returns the name of the implementation to run.

    Args:
        impl: one of `names`, which is obeyed or refused, or "auto".
        operation: the operation's name, for messages.
        names: the implementations that exist, "triton" among them; the first is the choice of
            "auto" where Triton is not.
        tensor: one of the operation's inputs.
        fast: whether Triton's is the fastest for these inputs on a GPU.

    Raises:
        ValueError: if there is no such implementation, or Triton cannot run on this device.
        ImportError: if "triton" is asked for and is not installed.
    """
    if impl == "auto":
        chosen = "triton" if fast and tensor.is_cuda and has_triton() else names[0]
        _log_once(operation, chosen, tensor.device.type, tensor.dtype)
        return chosen
    if impl not in names:
        raise ValueError(f"{operation}: impl must be 'auto' or one of {list(names)}; got {impl!r}")
    if impl == "triton":
        if not has_triton():
            raise ImportError(
                f"{operation}: impl='triton' needs the package triton, which is not installed: "
                "pip install 'specdec-toolkit[triton]', or leave impl at 'auto'"
            )
        if not tensor.is_cuda and not interpreting():
            raise ValueError(
                f"{operation}: impl='triton' needs tensors on a GPU; got {tensor.device}. With "
                "TRITON_INTERPRET=1 in the environment the interpreter runs it anywhere, slowly"
            )
    return impl


@functools.cache
def _log_once(operation: str, chosen: str, device: str, dtype: torch.dtype) -> None:
    _LOG.info("%s on %s with %s: %s", operation, device, dtype, chosen)
