"""What the layers of a model put out during a pass, for drafters that read the target's states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from specdec.errors import ConfigError, UnsupportedModelError

# where families keep their layers, behind `model.base_model`
LAYER_PATHS = (("layers",), ("h",), ("decoder", "layers"))


def layer_path(model: Any) -> tuple[str, ...]:
    """Returns the names that lead from `model.base_model` to the list of its decoder layers.

    Args:
        model: a HuggingFace causal language model.

    Raises:
        UnsupportedModelError: if they are not where they are known to be.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for path in LAYER_PATHS:
        if _is_stack(model.base_model, path, count):
            return path
    known = ", ".join(".".join(path) for path in LAYER_PATHS)
    raise UnsupportedModelError(
        f"the layers of {type(model).__name__} are not found: expected a list of {count} modules "
        f"at one of {known} of {type(model.base_model).__name__}; draft with another drafter"
    )


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """Returns the decoder layers of a HuggingFace causal language model, in order.

    Raises:
        UnsupportedModelError: if they are not where they are known to be.
    """
    module = model.base_model
    for name in layer_path(model):
        module = getattr(module, name)
    layers: torch.nn.ModuleList = module
    return layers


class FeatureTap:
    """Reads the outputs of some layers, by hooks that stand only while a pass runs.

    The indices are the layers' own: `output_hidden_states` counts differently in different versions
    of transformers and would keep every layer.

    Args:
        model: a HuggingFace causal language model.
        layers: which layers' outputs to read, 0 the first; negative ones count from the end.

    Attributes:
        layers: as given, counted from 0.

    Raises:
        ConfigError: for a layer the model does not have.
        UnsupportedModelError: if its layers are not found.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        stack = decoder_layers(model)
        count = len(stack)
        if any(not -count <= layer < count for layer in layers):
            raise ConfigError(
                f"features were asked of layers {list(layers)}; the model has layers 0 to "
                f"{count - 1}"
            )
        self.layers = tuple(layer % count for layer in layers)
        self._modules = {layer: stack[layer] for layer in set(self.layers)}
        self._outputs: dict[int, Tensor] = {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Has the next pass leave its features here."""
        self._outputs.clear()
        handles = [
            module.register_forward_hook(self._keeper(layer))
            for layer, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> Tensor:
        """Returns ``[B, N, L * D]`` features of the last pass, in the model's dtype.

        The states of the wanted layers stand one behind the other, in the order they were asked
        for; L layers, D the model's width.
        """
        outputs, self._outputs = self._outputs, {}
        parts = [outputs[layer] for layer in self.layers]
        return torch.cat([part.to(parts[0].device) for part in parts], dim=-1)

    def _keeper(self, layer: int) -> Any:
        def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            self._outputs[layer] = output[0] if isinstance(output, tuple) else output

        return keep


def _is_stack(base: Any, path: tuple[str, ...], count: int) -> bool:
    """Returns whether the module at a path is the list of the model's layers."""
    for name in path:
        base = getattr(base, name, None)
    return isinstance(base, torch.nn.ModuleList) and len(base) == count
