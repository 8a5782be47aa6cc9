"""A model of some of another model's layers, with its embedding, norm and head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from specdec.backend.features import decoder_layers, layer_path
from specdec.errors import UnsupportedModelError


def first_layers(model: Any, num_layers: int) -> Any:
    """Returns a model of the first layers with the same norm and head, sharing all weights.

    The model itself stays as it is; what changes its weights in place changes both.

    Args:
        model: a HuggingFace causal language model.
        num_layers: how many layers, at least 1.

    Raises:
        UnsupportedModelError: if its layers are not where they are known to be, or if hooks have
            replaced its forward pass (a device map of accelerate does), which would run them all.
    """
    return _with_layers(model, range(num_layers), list(decoder_layers(model))[:num_layers])


def copied_layers(model: Any, layers: Sequence[int]) -> Any:
    """Returns a model of copies of some layers, one behind the other; all else is shared.

    Args:
        model: a HuggingFace causal language model.
        layers: which layers, 0 the first; one may stand there more than once.

    Raises:
        UnsupportedModelError: as `first_layers`.
    """
    stack = decoder_layers(model)
    copies = []
    for place, layer in enumerate(layers):
        copied = copy.deepcopy(stack[layer])
        for module in copied.modules():  # their place in the cache
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]
        copies.append(copied)
    return _with_layers(model, layers, copies)


def with_head_rows(model: Any, rows: Tensor) -> Any:
    """Returns a model that gives the logits of some tokens only; it shares all but those rows.

    Args:
        model: a HuggingFace causal language model with a linear head.
        rows: ``[W]`` int64 token ids, the logits' new order.
    """
    head = model.get_output_embeddings()
    narrow = nn.Linear(head.weight.shape[1], len(rows), bias=head.bias is not None, device="meta")
    for name in ("weight", "bias")[: 1 if head.bias is None else 2]:
        tensor = getattr(head, name).detach()
        setattr(narrow, name, nn.Parameter(tensor[rows.to(tensor.device)], requires_grad=False))
    copied = _shallow_copy(model)
    copied.set_output_embeddings(narrow)
    return copied


def _with_layers(model: Any, layers: Sequence[int], modules: Sequence[nn.Module]) -> Any:
    """Returns a copy of the model that has `modules`, made for the places `layers`."""
    path = layer_path(model)
    cut = _shallow_copy(model)
    cut.config = copy.deepcopy(model.config)
    cut.config.num_hidden_layers = len(layers)
    types = getattr(model.config, "layer_types", None)
    if types:
        cut.config.layer_types = [types[layer] for layer in layers]
    parent = cut
    for name in (model.base_model_prefix, *path[:-1]):
        module = getattr(parent, name)
        if "forward" in vars(module) or "forward" in vars(model):
            raise UnsupportedModelError(
                f"the forward pass of {type(model).__name__} is wrapped (by a device map of "
                "accelerate, say), and would run all its layers; load the model on one device"
            )
        module = _shallow_copy(module)
        module.config = cut.config
        setattr(parent, name, module)
        parent = module
    stack = nn.ModuleList(modules)
    stack.training = model.training
    setattr(parent, path[-1], stack)
    return cut


def _shallow_copy(module: Any) -> Any:
    """Returns a module with the same children; replacing one leaves the original as it is."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied
