"""Decoder layers of the Llama kind on a CPU, as one call each during our passes.

A layer of transformers is some fifty operators in a dozen modules. For a handful of rows through a
small model to call them takes as long as the products: half of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specdec.backend.as_found import AsFound
from specdec.backend.attention import GROUPED
from specdec.backend.cache import LayerSpec, TreeCache, TreeLayer
from specdec.backend.cache_name import cache_argument, cache_in
from specdec.backend.linear_formats import PackedWeight
from specdec.backend.norms import NativeNorm, StandIn
from specdec.backend.tree_layers import TREE
from specdec.kernels.block_linear import MOST_ROWS
from specdec.kernels.decoder_layer import DecoderLayers, why_not_native
from specdec.kernels.layer_parts import LayerCall, LayerParts, Norm, Product

_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_PRODUCTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_LEAVES = {*_NORMS, *(name for names in _PRODUCTS for name in names), "mlp.act_fn"}
# attention that takes no notice of what some families hand over beside the mask
_ATTENTIONS = {"sdpa", GROUPED, TREE["sdpa"]}
_TOLERANCE = 1e-5  # of what a layer puts out and caches, relative to the largest entry
_TRIAL_NODES, _TRIAL_PREFIX = 3, 2

Products = Mapping[tuple[nn.Module, ...], PackedWeight | None]  # by the layers that are joined


class FusedLayer:
    """A decoder layer whose `forward` is one call wherever a pass of ours over few rows calls it.

    Args:
        layer: the module.
        products: of queries, keys and values; of what was attended; of gate and up; of down.
        norms: before the attention, before the gates; of queries and of keys, or no such ones.

    Attributes:
        layer: as given.
        parts: what it is made of.
        found: tells whether it still is.
        place: its place in a cache.
        config: its settings.

    Raises:
        ValueError: if the C code has no room for such a layer.
    """

    def __init__(
        self, layer: Any, products: Sequence[Product], norms: Sequence[NativeNorm]
    ) -> None:
        self.layer: nn.Module = layer
        attention = layer.self_attn
        # the tensors themselves: to put others in their places is noticed
        weights = [(norm.module, norm.module.get_parameter("weight")) for norm in norms]
        pairs = zip(weights, norms, strict=True)
        own = [Norm(weight, norm.eps, norm.offset) for (_, weight), norm in pairs]
        self.parts = LayerParts(
            *(products[0], products[1], products[2], products[3]),
            *(own[0], own[1]),
            int(attention.head_dim),
            float(attention.scaling),
            *((own[2], own[3]) if len(own) > 2 else (None, None)),
        )
        self.found = AsFound.layer(layer, weights)
        self.place = int(attention.layer_idx)
        self.config: Any = attention.config
        self._native = DecoderLayers([self.parts])

    def stand_in(self) -> StandIn:
        """Returns the module and what runs in place of its `forward`."""
        return self.layer, partial(self._forward, self.layer.forward)

    def _forward(
        self,
        own: Callable[..., Tensor],
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        cache = self._cache(cache_in(kwargs))
        starts = None if cache is None else cache.starts
        if (
            cache is None
            or starts is None
            or position_embeddings is None
            or not self._serves(hidden_states, attention_mask)
        ):
            return own(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return self._native.run(
            LayerCall(
                hidden_states,
                *position_embeddings,
                cache.of_layers((self.place,)),
                starts,
                attention_mask,
                cache.visible,
            )
        )

    def _cache(self, cache: Any) -> TreeCache | None:
        """Returns the cache if it is one of ours with a place for this layer."""
        layers = getattr(cache, "layers", ())
        layer = layers[self.place] if self.place < len(layers) else None
        return layer.cache if isinstance(layer, TreeLayer) else None

    def _serves(self, hidden: Tensor, mask: Tensor | None) -> bool:
        """Returns whether the C code takes such a pass, and the layer is as it was found to be."""
        return (
            hidden.dtype == torch.float32
            and takes(hidden.shape[0], hidden.shape[1], mask)
            and self.config._attn_implementation in _ATTENTIONS
            and self.found.holds()
        )


def takes(rows: int, nodes: int, mask: Tensor | None) -> bool:
    """Returns whether the C code takes a pass over nodes of some rows under a mask, or none."""
    if torch.is_grad_enabled() or rows * nodes > MOST_ROWS:
        return False
    # of several nodes without a mask each sees those before it, which is for the model's own
    return nodes == 1 if mask is None else mask.dtype == torch.float32


def fused_layers(
    modules: Iterable[nn.Module], products: Products, norms: Sequence[NativeNorm]
) -> list[FusedLayer]:
    """Returns the decoder layers that a `FusedLayer` computes; none where C code cannot be had.

    Names and parts say which layers are worth trying, what they compute is tried out.

    Args:
        modules: of a HuggingFace model.
        products: packed, of its linear layers.
        norms: of it.
    """
    if why_not_native() is not None:
        return []
    of_module = {norm.module: norm for norm in norms}
    found = (_of_parts(module, products, of_module) for module in modules)
    return [layer for layer in found if layer is not None and _agrees(layer)]


def _of_parts(
    module: nn.Module, products: Products, norms: Mapping[nn.Module, NativeNorm]
) -> FusedLayer | None:
    """Returns a layer made of the parts of a Llama's, with or without norms of heads."""
    if not isinstance(getattr(module, "self_attn", None), nn.Module):
        return None
    leaves = {name: m for name, m in module.named_modules() if not list(m.children())}
    names = (*_NORMS, *_HEAD_NORMS) if leaves.keys() > _LEAVES else _NORMS
    if leaves.keys() != _LEAVES | set(names):
        return None
    packed = [products.get(tuple(leaves[name] for name in joined)) for joined in _PRODUCTS]
    own_products = [weight.product for weight in packed if weight and weight.product]
    own_norms = [norms[leaves[name]] for name in names if leaves[name] in norms]
    if len(own_products) < len(packed) or len(own_norms) < len(names):
        return None
    try:
        return FusedLayer(module, own_products, own_norms)
    except ValueError:
        return None  # heads of another width, or norms of several kinds


@torch.inference_mode(False)
@torch.no_grad()
def _agrees(fused: FusedLayer) -> bool:
    """Returns whether a layer puts out and caches what the module's own `forward` does."""
    layer: Any = fused.layer
    attention, index = layer.self_attn, int(layer.self_attn.layer_idx)
    width = attention.head_dim
    spec = LayerSpec(
        attention.k_proj.out_features // width, width, width, torch.float32, torch.device("cpu")
    )
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    hidden = draw(1, _TRIAL_NODES, layer.input_layernorm.weight.shape[0])
    angles = draw(1, _TRIAL_NODES, width // 2).repeat(1, 1, 2)
    prefix = draw(2, 1, spec.num_heads, _TRIAL_PREFIX, width)
    slots = _TRIAL_PREFIX + _TRIAL_NODES
    mask = torch.full((_TRIAL_NODES, slots), -torch.inf).triu(_TRIAL_PREFIX + 1)
    mask[2, _TRIAL_PREFIX + 1] = -torch.inf  # a tree: the last node does not see its brother
    results = []
    for forward in (layer.forward, fused.stand_in()[1]):
        cache = TreeCache([spec] * (index + 1), 1, slots)
        cache.layers[index].keys[:, :, :_TRIAL_PREFIX] = prefix[0]
        cache.layers[index].values[:, :, :_TRIAL_PREFIX] = prefix[1]
        cache.advance([_TRIAL_PREFIX])
        cache.begin_pass(_TRIAL_NODES)
        try:
            output = forward(
                hidden.clone(),
                attention_mask=mask[None, None],
                position_embeddings=(angles.cos(), angles.sin()),
                **{cache_argument(layer.forward): cache.hf_cache},
            )
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False  # it wants to be told more
        if not isinstance(output, Tensor):
            return False
        results.append((output, cache.layers[index].keys, cache.layers[index].values))
    return all(
        bool(((got - own).abs() <= _TOLERANCE * own.abs().amax()).all())
        for own, got in zip(*results, strict=True)
    )
