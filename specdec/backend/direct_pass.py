"""A pass over a few rows past the model's own code: embedding, angles, layers, norm and head.

What transformers does around decoder layers and between them (checks, masks, outputs with names,
thirty calls of modules) takes a quarter of a small model's pass when the layers are fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from specdec.backend.angles import Angles
from specdec.backend.as_found import AsFound
from specdec.backend.cache import TreeCache
from specdec.backend.fused_layers import FusedLayer
from specdec.backend.packed import PackedLinears
from specdec.kernels.block_linear import MOST_ROWS
from specdec.kernels.decoded import Decoded
from specdec.kernels.decoder import Decoder
from specdec.kernels.layer_parts import DecoderCall, Ends, Norm
from specdec.kernels.multi_step import RowDecoder, serves
from specdec.kernels.step_structs import MOST_NODES
from specdec.kernels.tree_mask import ancestor_matrix

if TYPE_CHECKING:
    from specdec.backend.model import TreeModel

_OF_MODEL = {"model", "lm_head"}
_OF_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
_ATTENTION = "sdpa"
_NOWHERE = torch.zeros(1, 1, dtype=torch.int64)  # a position, where only a table is wanted
_TRIAL_PROMPT, _TRIAL_PARENTS, _TRIAL_DEPTHS = 3, (-1, 0, 0, 2), (0, 1, 1, 2)


class DirectPass:
    """The parts of a model whose decoder layers are all fused, run in one call.

    Args:
        model: a causal language model with the modules of a Llama.
        layers: its decoder layers, in order.
        packed: of its linear layers and norms.
        window: tokens see positions less than this behind theirs; None for all.

    Raises:
        ValueError: if the layers are not of one shape, or do not share their settings, or what
            stands around them has others than those of a Llama.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[FusedLayer],
        packed: PackedLinears,
        *,
        window: int | None,
    ) -> None:
        body = model.model
        self._config = layers[0].config  # of the whole model, where this one is a part of it
        if any(layer.config is not self._config for layer in layers):
            raise ValueError("the layers must share their settings")
        norm = packed.norm_of(body.norm)
        if norm is None or body.embed_tokens.max_norm is not None:
            raise ValueError("embedding and norm must do nothing besides")
        weights = [(m, m.get_parameter("weight")) for m in (body.embed_tokens, body.norm)]
        self._embedding, of_norm = [weight for _, weight in weights]
        head = packed.product_of(model.lm_head)
        # in another layout the head is multiplied with by itself
        self._head = None
        if head is None:
            self._head = packed.forwards.get(model.lm_head, model.lm_head.forward)
        self._decoder = Decoder(
            [layer.parts for layer in layers],
            Ends(self._embedding, Norm(of_norm, norm.eps, norm.offset), head),
        )
        self._places = tuple(layer.place for layer in layers)
        self._window = window
        self._angles = Angles(body.rotary_emb)
        self._several = serves()
        around = [model, body, model.lm_head, *(getattr(body, name) for name in _OF_BODY)]
        own = AsFound.of([*around, *(layer.layer for layer in layers)], weights)
        self._found = AsFound.joined([own, *(layer.found for layer in layers)])
        self._model = model
        self.look()

    @property
    def moved(self) -> bool:
        """Whether it reads parameters that the model has no more."""
        return self._found.moved

    def look(self) -> None:
        """Looks whether the model is as it was found: before a call, as it costs what a norm does.

        Within a call hooks are noticed, training, gradients, autocast and another attention; where
        several steps run (`of_row`), before the first of them.
        """
        self._as_found = self._found.holds()
        self._hooks_so_far = RemovableHandle.next_id

    def serves(self, tokens: Tensor, ancestors: Tensor | None) -> bool:
        """Returns whether it takes such a pass, and the model is as it was and not looked at."""
        if self._hooks_so_far != RemovableHandle.next_id:  # torch counts them, of all modules
            self.look()
        batch, nodes = tokens.shape
        return (
            # without ancestors each of several nodes sees those before it
            (ancestors is not None or (nodes == 1 and self._window is None))
            and batch * nodes <= MOST_ROWS
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and self._config._attn_implementation == _ATTENTION
            and not self._model.training
            and self._as_found
        )

    def of_row(self, cache: TreeCache, top_k: int, most_nodes: int) -> RowDecoder | None:
        """Returns what goes on with a cache of one row by itself; None where only passes can.

        It holds until keys and values, or the model's parts, are elsewhere.

        Args:
            cache: of the row.
            top_k: likeliest tokens wanted behind each node.
            most_nodes: of a tree.
        """
        most = self._decoder.most_selected
        cos, sin = self._angles.of(self._embedding, _NOWHERE, cache.capacity)
        fits = 0 < top_k <= most and cos.dim() == 2 and most_nodes <= MOST_NODES
        if self._window is not None or not fits or not self._several:
            return None
        layers = cache.of_layers(self._places)
        return RowDecoder(self._decoder, layers, cos, sin, top_k=top_k, most_nodes=most_nodes)

    def run(
        self,
        cache: TreeCache,
        tokens: Tensor,
        positions: Tensor,
        ancestors: Tensor | None,
        keep: Tensor | None,
        top_k: int = 0,
    ) -> Decoded:
        """Returns what `TreeModel.forward_selecting` does."""
        visible = cache.visible
        # no position is beyond its slot
        cos, sin = self._angles.of(self._embedding, positions[:, -tokens.shape[1] :], visible)
        starts = cache.starts
        assert starts is not None
        output = self._decoder.run(
            DecoderCall(
                tokens,
                positions,
                ancestors,
                self._window,
                cos,
                sin,
                cache.of_layers(self._places),
                starts,
                visible,
                keep,
                top_k if top_k <= self._decoder.most_selected else 0,
            )
        )
        return output if self._head is None else Decoded(self._head(output.logits))


@torch.inference_mode(False)
@torch.no_grad()
def direct_pass(backend: TreeModel, packed: PackedLinears) -> DirectPass | None:
    """Returns a model's direct pass if it consists of a Llama's parts and does nothing else.

    Names say which model is worth trying; logits, keys and values of a small tree and of a single
    token must then be the very bits that the model's own code gives with the same layers.

    Args:
        backend: the probed model, without a direct pass.
        packed: of it, or of a model that it is a part of.
    """
    model: Any = backend.model
    if _names(model) != _OF_MODEL or _names(model.model) != _OF_BODY:
        return None
    if len(backend.traits.layer_types) > 1:
        return None  # each kind of layer has a mask of its own
    body = model.model
    of_module = {layer.layer: layer for layer in packed.fused}
    layers = [of_module[module] for module in body.layers if module in of_module]
    if len(layers) != len(body.layers) or type(body.embed_tokens) is not nn.Embedding:
        return None
    try:
        direct = DirectPass(model, layers, packed, window=backend.traits.window)
    except ValueError:
        return None
    if not direct.serves(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1).bool()):
        return None  # somebody looks at a part: it could not be tried out
    expected = _trial(backend)
    backend.direct = direct
    try:
        got = _trial(backend)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None  # its parts want to be told more
    finally:
        backend.direct = None
    return direct if all(map(torch.equal, expected, got)) else None


def _trial(backend: TreeModel) -> list[Tensor]:
    """Returns logits, keys and values of a prompt, a token behind it and a small tree."""
    nodes = len(_TRIAL_PARENTS)
    size = _TRIAL_PROMPT + 1 + nodes
    cache = TreeCache(backend.specs, 1, size)
    tokens = (1 + torch.arange(size)).unsqueeze(0) % backend.traits.vocab_size
    positions = torch.arange(size).unsqueeze(0)
    positions[:, -nodes:] = _TRIAL_PROMPT + 1 + torch.tensor(_TRIAL_DEPTHS)
    sees = ancestor_matrix(_TRIAL_PARENTS, nodes).unsqueeze(0)
    results, start = [], 0
    for count, ancestors in ((_TRIAL_PROMPT, None), (1, None), (nodes, sees)):
        some = slice(start, start + count)
        results.append(backend.forward(cache, tokens[:, some], positions[:, some], ancestors))
        cache.advance([count])
        start += count
    for layer in cache.layers:
        results += [layer.keys, layer.values]
    return results


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
