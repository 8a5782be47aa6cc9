"""A model's RMS norms on a CPU, as one call each during our passes.

Transformers' modules make a norm of eight operators, which for a handful of rows is eight times the
price of starting one: a tenth of a pass of a small model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from specdec.kernels.rms_norm import rms_norm, why_not_native

StandIn = tuple[nn.Module, Callable[..., Tensor]]  # and what runs in place of its `forward`

_OFFSETS = (0.0, 1.0)  # Gemma's weights count from one
_TOLERANCE = 2e-6  # relative to the largest entry: float32 in another order of sums
_TRIAL_ROWS = 3


@dataclass(eq=False)
class NativeNorm:
    """A norm whose `forward` is one call of `specdec.kernels.rms_norm`."""

    module: nn.Module
    eps: float
    offset: float

    def stand_in(self) -> StandIn:
        """Returns the module and what runs in place of its `forward`."""
        return self.module, partial(self._forward, self.module.forward)

    def _forward(self, own: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        # the weight may have been replaced or cast since
        weight = self.module._parameters["weight"]
        plain = weight is not None and weight.dtype == rows.dtype == torch.float32
        if not plain or rows.device.type != "cpu" or torch.is_grad_enabled():
            return own(rows)
        assert weight is not None
        return rms_norm(rows, weight, eps=self.eps, offset=self.offset)


def native_norms(model: nn.Module) -> list[NativeNorm]:
    """Returns the norms of a model that `rms_norm` computes; none where C code cannot be had.

    What a module computes is tried out, not told from its name alone: the name says which are
    worth trying.
    """
    named = [m for m in model.modules() if "RMSNorm" in type(m).__name__ and _is_plain(m)]
    if not named or why_not_native() is not None:
        return []
    return [norm for norm in map(_matching, named) if norm is not None]


def _is_plain(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    only = len(list(module.parameters())) == 1 and not list(module.buffers())
    if not only or weight is None or "forward" in module.__dict__ or weight.dim() != 1:
        return False
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return plain and weight.is_contiguous() and _eps_of(module) is not None


def _eps_of(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


@torch.no_grad()
def _matching(module: nn.Module) -> NativeNorm | None:
    """Returns what computes the same as the module, None if nothing does."""
    weight, eps = module.get_parameter("weight"), _eps_of(module)
    assert eps is not None
    generator = torch.Generator().manual_seed(0)
    # small rows among them, which tell what is done with eps
    sizes = torch.tensor([1.0, eps**0.5, 100.0]).unsqueeze(1)
    rows = torch.randn(_TRIAL_ROWS, len(weight), generator=generator) * sizes
    expected = module(rows)
    for offset in _OFFSETS:
        got = rms_norm(rows, weight, eps=eps, offset=offset)
        if got.shape == expected.shape and got.dtype == expected.dtype:
            bound = _TOLERANCE * expected.abs().amax()
            if bool(((got - expected).abs() <= bound).all()):
                return NativeNorm(module, eps, offset)
    return None
