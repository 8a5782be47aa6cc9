"""Whether a model's passes can be recorded: found by experiment, before anyone relies on it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdec.backend.captured import CapturedPasses, bucket
from specdec.backend.model import TreeModel, causal_ancestors
from specdec.backend.probe import TOLERANCE, relative_error
from specdec.backend.recorders import CudaGraphs, Recorder
from specdec.errors import ConfigError, UnsupportedModelError
from specdec.kernels.tree_mask import ancestor_matrix

logger = logging.getLogger(__name__)

_PARENTS = [-1, 0, 0, 2, 1]
_PREFIX = 3


def captured_passes(
    backend: TreeModel,
    choice: bool | str,
    make_recorder: Callable[[], Recorder] | None = None,
) -> CapturedPasses | None:
    """Returns what runs a model's passes from recordings; None where they run as they are.

    Args:
        backend: the probed model.
        choice: the generator's `compile`: True, False, or "auto" for where it is possible.
        make_recorder: in place of CUDA graphs on the model's device.

    Raises:
        ConfigError: for another value, or True where there are no CUDA graphs.
        UnsupportedModelError: if it is True and the model's passes cannot be recorded.
    """
    if not isinstance(choice, bool) and choice != "auto":
        raise ConfigError(f"compile must be True, False or 'auto', got {choice!r}")
    if choice is False:
        return None
    device = backend.device
    if make_recorder is None:
        if device.type != "cuda":
            if choice == "auto":
                logger.info("passes are not captured: the model is on %s", device)
                return None
            raise ConfigError(
                "compile=True records passes as CUDA graphs, and the model is on "
                f"{device}; leave compile at 'auto', or move the model to a GPU"
            )
        make_recorder = partial(CudaGraphs, device)
    passes = CapturedPasses(backend, make_recorder, required=choice is True)
    reason = obstacle(backend, passes)
    if reason is None:
        logger.info("passes over trees are captured")
        return passes
    if choice == "auto":
        logger.info("passes are not captured: %s", reason)
        return None
    raise UnsupportedModelError(
        f"compile=True cannot be obeyed: {reason}. compile='auto' runs its passes as they are"
    )


def obstacle(backend: TreeModel, passes: CapturedPasses) -> str | None:
    """Returns why a model's passes cannot be recorded; None if they can.

    The same small trees are scored from recordings and as usual, at several lengths: what a pass
    fixes on the host, it would repeat at the wrong place.
    """
    name = type(backend.model).__name__
    places = {spec.device for spec in backend.specs} | {backend.device}
    if len(places) > 1:
        return f"{name} is spread over {', '.join(sorted(map(str, places)))}"
    if backend.packed is not None:
        return f"{name} runs from packed weights, by code on the host"
    limit = backend.traits.positions
    if limit is not None and limit.kind in ("dynamic", "longrope"):
        return f"{name} has {limit.kind} rope, whose frequencies are looked up on the host"
    reads = HostReads()
    try:
        with torch.autocast(backend.device.type, enabled=False):  # calls under it are not served
            error = _error(backend, passes, reads)
    except _ReadsError:
        return f"{name} reads values on the host inside its pass ({', '.join(reads.found)})"
    except RuntimeError as failure:
        return f"recording a pass of {name} failed: {failure}"
    finally:
        passes.close()
    tolerance = TOLERANCE.get(backend.model.dtype, 1e-1)
    if not error <= tolerance:
        return (
            f"repeated passes of {name} differ from its own by {error:.1e}, allowed "
            f"{tolerance:.0e}: it fixes something on the host"
        )
    return None


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects operations that wait for values on the host, or copy between devices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if _reads(func, args) or _moves(args, output):
            name = str(func.overloadpacket)
            if name not in self.found:
                self.found.append(name)
        return output


class _ReadsError(Exception):
    """A pass has read values on the host."""


def _reads(func: Any, args: tuple[Any, ...]) -> bool:
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
        # whose size depends on values only where the index is a mask
        return any(leaf.dtype in (torch.bool, torch.uint8) for leaf in _tensors(args[1]))
    return torch.Tag.dynamic_output_shape in func.tags


def _moves(args: tuple[Any, ...], output: Any) -> bool:
    # numbers held in tensors of no dimension become arguments of the kernels
    places = {leaf.device for leaf in _tensors((args, output)) if leaf.dim() > 0}
    return len(places) > 1


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@torch.no_grad()
def _error(backend: TreeModel, passes: CapturedPasses, reads: HostReads) -> float:
    """Returns the largest relative error of recorded passes; the first one is looked at closely."""
    cache = passes.new_cache(2, 64)
    own = backend.new_cache(2, 64)
    nodes = len(_PARENTS)
    assert bucket(nodes) == nodes
    ancestors = ancestor_matrix(_PARENTS, nodes).expand(2, -1, -1)
    depths = ancestors.sum(-1) - 1
    vocab_size = backend.traits.vocab_size
    prefix = 7919 * torch.arange(1, 2 * _PREFIX + 1).view(2, -1) % vocab_size
    positions = torch.arange(_PREFIX).expand(2, -1)
    for each in (cache, own):
        backend.forward(each, prefix, positions, causal_ancestors(2, _PREFIX))
        each.advance([_PREFIX, _PREFIX - 1])
    worst = 0.0
    for step in range(5):
        tokens = (104_729 * torch.arange(1, 2 * nodes + 1).view(2, -1) + 17 * step) % vocab_size
        positions = torch.tensor(own.lengths).unsqueeze(1) + depths
        if step == 0:
            with reads:
                logits, _ = passes.run(cache, tokens, positions, ancestors)
            if reads.found:
                raise _ReadsError
        else:
            logits, _ = passes.run(cache, tokens, positions, ancestors)
        expected = backend.forward(own, tokens, positions, ancestors)
        worst = max(worst, relative_error(logits.cpu(), expected.cpu()))
        for each in (cache, own):
            each.commit([[0, 2, 3][: 1 + step % 3], [0]])
    return worst
