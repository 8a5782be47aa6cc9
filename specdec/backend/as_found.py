"""Whether modules are still what they were when it was tried out what they compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks


class AsFound:
    """What modules were like; it neither copies nor changes anything of them.

    Hooks, replaced parts and parameters, and a `forward` of somebody else's tell that somebody
    looks at the parts or has changed what they do.
    """

    def __init__(self) -> None:
        self._training: list[nn.Module] = []
        self._hooks: list[Any] = [_global_forward_hooks, _global_forward_pre_hooks]
        self._own_hooks: list[Any] = []  # of whole layers, which see what they saw
        self._places: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
        self._containers: list[dict[str, Any]] = []
        self._weights: list[tuple[dict[str, Any], Tensor, int]] = []

    @classmethod
    def layer(cls, layer: Any, weights: Sequence[tuple[nn.Module, Tensor]]) -> AsFound:
        """Returns what a decoder layer with `self_attn` and `mlp` is like inside.

        Args:
            layer: the module.
            weights: parameters that are read without asking their module: of what, and which.
        """
        made = cls()
        parents = (layer, layer.self_attn, layer.mlp)
        inner = [module for module in layer.modules() if module is not layer]
        made._training = [layer]
        made._hooks += [hooks for m in inner for hooks in _hooks_of(m)]
        made._own_hooks = [*_hooks_of(layer)]
        made._places = _places(parents)  # an adapter puts modules in their places
        made._containers = [parent.__dict__ for parent in parents[1:]]
        made._weights = _weights(weights)
        return made

    @classmethod
    def of(
        cls, modules: Sequence[nn.Module], weights: Sequence[tuple[nn.Module, Tensor]] = ()
    ) -> AsFound:
        """Returns what single modules are like, what they contain apart.

        Args:
            modules: any.
            weights: as in `layer`.
        """
        made = cls()
        made._training = list(modules)
        made._hooks += [hooks for module in modules for hooks in _hooks_of(module)]
        made._places = _places(modules)
        made._containers = [module.__dict__ for module in modules]
        made._weights = _weights(weights)
        return made

    @classmethod
    def joined(cls, parts: Iterable[AsFound]) -> AsFound:
        """Returns several as one, in which hooks on whole layers count as well."""
        made = cls()
        for part in parts:
            made._training += part._training
            made._hooks += [*part._hooks, *part._own_hooks]
            made._places += part._places
            made._containers += part._containers
            made._weights += part._weights
        return made

    @property
    def moved(self) -> bool:
        """Whether a parameter that is read without asking its module is another one by now."""
        return any(
            parameters["weight"] is not weight or weight.data_ptr() != address
            for parameters, weight, address in self._weights
        )

    def holds(self) -> bool:
        """Returns whether all is as it was, not in training, and nobody looks at the parts."""
        # loops: over hundreds of parts a generator takes twice the time
        for modules, name, child in self._places:
            if modules[name] is not child:
                return False
        for container in self._containers:
            if "forward" in container:
                return False
        for parameters, weight, address in self._weights:
            if parameters["weight"] is not weight or weight.data_ptr() != address:
                return False
        for module in self._training:
            if module.training:
                return False
        return not any(self._hooks)


def _hooks_of(module: nn.Module) -> tuple[Any, Any]:
    return module._forward_hooks, module._forward_pre_hooks


def _places(
    parents: Iterable[nn.Module],
) -> list[tuple[dict[str, nn.Module | None], str, nn.Module]]:
    return [
        (parent._modules, name, child)
        for parent in parents
        for name, child in parent.named_children()
    ]


def _weights(
    weights: Iterable[tuple[nn.Module, Tensor]],
) -> list[tuple[dict[str, Any], Tensor, int]]:
    return [(module._parameters, weight, weight.data_ptr()) for module, weight in weights]
