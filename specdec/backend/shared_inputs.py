"""Which linear layers of a model are handed the same tensor, and so could be one product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _LinearCall(NamedTuple):
    """A call of a layer in a pass; `rows` is kept alive, so that no other tensor takes its name."""

    layer: nn.Linear
    rows: Tensor
    version: int

    def joins(self, other: _LinearCall) -> bool:
        """Returns whether both were handed the same tensor with the same contents."""
        alike = (self.layer.bias is None) == (other.layer.bias is None)
        return alike and self.rows is other.rows and self.version == other.version


@torch.inference_mode(False)
@torch.no_grad()
def shared_inputs(model: nn.Module, layers: Sequence[nn.Linear]) -> list[list[nn.Linear]]:
    """Returns the layers in groups that are handed the same tensor; runs the model to see it.

    Args:
        model: a HuggingFace model.
        layers: of it, the ones to look at.
    """
    calls: list[_LinearCall] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args: calls.append(_LinearCall(module, args[0], args[0]._version))
        )
        for layer in layers
    ]
    try:
        model(input_ids=torch.tensor([[1, 2]]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    times_called = Counter(call.layer for call in calls)
    groups: list[list[nn.Linear]] = []
    last: _LinearCall | None = None
    for call in calls:
        if times_called[call.layer] > 1:
            last = None
            continue
        if last is not None and call.joins(last):
            groups[-1].append(call.layer)
        else:
            groups.append([call.layer])
        last = call
    joined = {layer for group in groups for layer in group}
    return groups + [[layer] for layer in layers if layer not in joined]
