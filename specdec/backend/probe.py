"""A small experiment that shows whether a model computes a tree as it computes its paths."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from specdec.backend.cache import LayerSpec
from specdec.backend.cache_name import cache_in
from specdec.backend.model import TreeModel, causal_ancestors
from specdec.backend.packed import packed_linears
from specdec.backend.tree_layers import KNOWN_IMPLS, NotServedError
from specdec.errors import ConfigError, UnsupportedModelError
from specdec.kernels.tree_mask import ancestor_matrix

# largest error allowed, relative to the largest logit: rounding stays far below, a leak does not
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
_PREFIX = 3


def probed(
    model: Any, packed_weights: str | None = "auto", tree_attention: str | None = None
) -> TreeModel:
    """Returns a model that was found to take trees, its linear layers packed where that pays.

    Args:
        model: a HuggingFace causal language model.
        packed_weights: see `specdec.backend.packed.packed_linears`.
        tree_attention: see `TreeModel`; the model's own attention takes its place, with a warning,
            where it does not serve.

    Raises:
        UnsupportedModelError: if the model cannot take trees.
        ConfigError: for an unknown format of packed weights, or an unknown attention.
        ImportError: if "triton" is asked for and is not installed.
    """
    if tree_attention is not None and tree_attention not in KNOWN_IMPLS:
        raise ConfigError(
            f"tree_attention must be None or one of {list(KNOWN_IMPLS)}, got {tree_attention!r}"
        )
    backend = TreeModel(model, tree_attention)
    probe(backend)
    backend.packed = packed_linears(model, packed_weights)
    backend.refresh()
    return backend


@torch.no_grad()
def probe(backend: TreeModel) -> None:
    """Compares a 4-node tree, and a token after one of its paths, with the model's own passes.

    Effects:
        Fills ``backend.specs`` with what the model's own cache looks like.

    Raises:
        UnsupportedModelError: if the cache has no plain keys and values, or the logits differ.
    """
    vocab_size = backend.traits.vocab_size
    a, b, c, root, left, right, below, after = ((7919 * i + 11) % vocab_size for i in range(1, 9))
    # the tree: root -> (left, right), right -> below; then `after` follows the path right, below
    paths = torch.tensor([[a, b, c, root, left, left, left], [a, b, c, root, right, below, after]])
    output = backend.model(input_ids=paths.to(backend.device), use_cache=True, return_dict=True)
    past = cache_in(output)  # a few models keep no cache at all
    backend.specs = _layer_specs(past, type(backend.model).__name__)
    left_path, right_path = output.logits.cpu()
    expected = torch.stack(
        [left_path[3], left_path[4], right_path[4], right_path[5], right_path[6]]
    )

    def error_of_tree() -> float:
        logits = _tree_logits(backend, [a, b, c], [root, left, right, below], after)
        return relative_error(logits, expected)

    tolerance = TOLERANCE.get(expected.dtype, 1e-1)
    if backend.tree_attention is not None:
        try:
            error = error_of_tree()
            reason = f"a relative error of {error:.1e}"
        except (NotServedError, TypeError) as failure:
            error, reason = math.inf, str(failure)
        if not error <= tolerance:
            backend.tree_attention = None
            warnings.warn(
                f"{type(backend.model).__name__} keeps its own attention, specdec's tree attention "
                f"does not serve it: {reason}",
                stacklevel=4,
            )
    error = error_of_tree()
    if not error <= tolerance and backend.attention is not None:
        backend.attention = None
        error = error_of_tree()
    if not error <= tolerance:
        hint = (
            " (the model is in training mode: call model.eval())" if backend.model.training else ""
        )
        raise UnsupportedModelError(
            f"{type(backend.model).__name__} does not compute a tree as it computes its paths: "
            f"relative error {error:.1e}, allowed {tolerance:.0e} in {expected.dtype}{hint}. "
            "State leaks between siblings, or the tree mask is not applied."
        )


def _tree_logits(backend: TreeModel, prefix: list[int], tree: list[int], after: int) -> Tensor:
    """Returns ``[5, V]``: logits at the four nodes, and at `after` behind the path (2, 3)."""
    cache = backend.new_cache(batch_size=1, capacity=16)
    backend.forward(cache, torch.tensor([prefix]), torch.arange(_PREFIX).unsqueeze(0), None)
    cache.advance([_PREFIX])
    ancestors = ancestor_matrix([-1, 0, 0, 2], 4).unsqueeze(0)
    positions = torch.tensor([[0, 1, 1, 2]]) + _PREFIX
    nodes = backend.forward(cache, torch.tensor([tree]), positions, ancestors)[0].cpu()
    cache.commit([[0, 2, 3]])
    last = backend.forward(
        cache, torch.tensor([[after]]), torch.tensor([[_PREFIX + 3]]), causal_ancestors(1, 1)
    )[0].cpu()
    return torch.cat([nodes, last])


def _layer_specs(cache: Any, name: str) -> list[LayerSpec]:
    layers = getattr(cache, "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise UnsupportedModelError(
            f"{name} keeps no plain keys and values in each layer (shared or recurrent layers), "
            "so a tree's rejected branches could not be taken back"
        )
    return [LayerSpec.of(layer) for layer in layers]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference of two tensors, relative to the largest of those expected."""
    scale = expected.double().abs().max().clamp(min=1e-30)
    return float((actual.double() - expected.double()).abs().max() / scale)
