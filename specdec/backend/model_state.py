"""What a recorded pass of a model depends on beside its inputs: weights, modules, settings."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def model_state(model: nn.Module) -> Hashable:
    """Returns a value that changes when a recorded pass of the model would no longer be right.

    It holds the addresses and versions of all weights and buffers, and the modules' plain
    attributes, among which adapters keep which of them is active and how it is scaled. What it
    takes for a change without need costs a recording and no more.

    Args:
        model: any module; a walk over it takes milliseconds.
    """
    return tuple(
        (id(module), type(module), *((name, _plain(value)) for name, value in vars(module).items()))
        for module in model.modules()
    )


def foreign_hook(model: nn.Module) -> str | None:
    """Returns the name of a module with a forward hook that is not transformers' own; else None.

    A recorded pass would not call it.
    """
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return "every module"
    for name, module in model.named_modules():
        for kind in _HOOKS:
            for hook in getattr(module, kind).values():
                if not str(getattr(hook, "__module__", "")).startswith("transformers."):
                    return name or type(module).__name__
    return None


def _plain(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        version = 0 if value.is_inference() else value._version
        return value.data_ptr(), value.dtype, value.shape, value.stride(), version
    if isinstance(value, (int, float, str, bool, torch.dtype, torch.device, type(None))):
        return value
    if isinstance(value, dict):
        return tuple((str(key), _plain(own)) for key, own in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(str, value)))
    return id(value)
