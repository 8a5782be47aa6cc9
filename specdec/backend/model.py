"""One pass of a HuggingFace model over a padded batch of trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from specdec.backend.attention import GROUPED, attention_of, pays
from specdec.backend.cache import LayerSpec, TreeCache
from specdec.backend.cache_name import cache_argument
from specdec.backend.direct_pass import DirectPass, direct_pass
from specdec.backend.masks import as_additive, tree_visibility
from specdec.backend.packed import PackedLinears
from specdec.backend.support import ModelTraits, read_traits
from specdec.backend.tree_layers import ARGUMENT, MAX_NODES, TREE, TreePass
from specdec.kernels.decoded import Decoded
from specdec.kernels.tree_mask import visible_slots

if TYPE_CHECKING:
    from specdec.backend.captured import CapturedPasses
    from specdec.backend.fused_layers import FusedLayer


class TreeModel:
    """A model that can be asked for the logits of trees.

    It holds no state of a call: the cache is made by `new_cache` and handed in. The model is
    changed only while a pass runs: packed weights stand in for its linear layers then.

    Args:
        model: a HuggingFace causal language model with attn_implementation "sdpa" or "eager".
        tree_attention: implementation of `specdec.kernels.tree_attention` for the passes over
            trees; None for the model's own attention under a mask.

    Attributes:
        captured: runs passes over trees from recordings; None where they are not recorded.
        direct: runs passes over few rows past the model's own code; None where that cannot be.

    Raises:
        UnsupportedModelError: if the model cannot take trees.
    """

    def __init__(self, model: Any, tree_attention: str | None = None) -> None:
        self.model = model
        self.traits: ModelTraits = read_traits(model)
        self.specs: list[LayerSpec] = []  # filled by the probe, which sees the model's own cache
        self.packed: PackedLinears | None = None
        # the probe goes back to the model's own attention if this one does not serve
        self.attention: str | None = GROUPED if pays(self.device, self.traits.attention) else None
        self.tree_attention = tree_attention
        self.captured: CapturedPasses | None = None
        self.direct: DirectPass | None = None
        self._fused: Sequence[FusedLayer] = ()  # that it was made of
        # transformers looks for both in the modules, which takes as long as making a mask
        self._device: torch.device = self.device
        self._dtype: torch.dtype = model.dtype
        self._config = model.config.get_text_config(decoder=True)
        self._cache_argument = cache_argument(model.forward)
        self._keeps_logits: bool = model._supports_logits_to_keep()

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        table = self.model.get_input_embeddings()
        device: torch.device = table.weight.device
        if device.type == "meta":  # offloaded by accelerate: it runs where its hook says
            device = torch.device(getattr(table._hf_hook, "execution_device", "cpu"))
        return device

    def refresh(self) -> None:
        """Packs weights anew that have changed since, and looks whether the model's parts have."""
        self._device, self._dtype = self.device, self.model.dtype
        if self.packed is not None:
            self.packed.refresh()
            moved = self.direct is not None and self.direct.moved
            if self._fused is not self.packed.fused or moved:
                self._fused = self.packed.fused
                self.direct = None  # of other weights
                self.direct = direct_pass(self, self.packed)
            elif self.direct is not None:
                self.direct.look()

    def unpack(self) -> None:
        """Lets go of the packed weights: passes run the model's own layers from now on."""
        self.packed, self.direct, self._fused = None, None, ()

    def new_cache(self, batch_size: int, capacity: int) -> TreeCache:
        """Returns an empty cache for `batch_size` rows of `capacity` slots."""
        self.refresh()
        return TreeCache(self.specs, batch_size, capacity)

    def forward(
        self,
        cache: TreeCache,
        tokens: Tensor,
        positions: Tensor,
        ancestors: Tensor | None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Runs one pass over new nodes and writes their keys and values behind each row's others.

        Args:
            cache: `new_cache`'s; nothing is committed here, the new nodes are pending.
            tokens: ``[B, N]`` int64, the new nodes.
            positions: ``[B, M]`` int64 of all pending nodes, the new ones last: length of the
                row's prefix plus depth.
            ancestors: ``[B, N, M]`` bool, which of them each new node sees; None for a causal pass
                behind prefixes of equal length, which then goes the model's own way, with its own
                masks.
            keep: ``[K]`` int64 indices into N whose logits are wanted; None for all.

        Returns:
            ``[B, N, V]`` (or ``[B, K, V]``) logits in the model's dtype.
        """
        return self.forward_selecting(cache, tokens, positions, ancestors, keep).logits

    def forward_selecting(
        self,
        cache: TreeCache,
        tokens: Tensor,
        positions: Tensor,
        ancestors: Tensor | None,
        keep: Tensor | None = None,
        top_k: int = 0,
    ) -> Decoded:
        """Does what `forward` does, and selects the largest logits where that is on its way.

        Args:
            cache: this and the others as for `forward`.
            tokens: new nodes.
            positions: of all pending nodes.
            ancestors: which of them each new node sees.
            keep: whose logits are wanted.
            top_k: logits to select of each; passes that run the model's own code select none.
        """
        positions = self.within_table(positions)
        new = tokens.shape[1]
        cache.begin_pass(new)
        # the kernel's queries are whole trees; what goes on with one, or a long prompt, is not
        whole = ancestors is not None and new == ancestors.shape[2] <= MAX_NODES
        of_kernel = whole and self.tree_attention is not None
        direct = self.direct
        if direct is not None and not of_kernel and direct.serves(tokens, ancestors):
            decoded = direct.run(cache, tokens, positions, ancestors, keep, top_k)
            cache.end_pass()
            return decoded
        masks: dict[str, tuple[Tensor, int | None]] = {}
        trees: TreePass | None = None
        attention: str | None = None
        if ancestors is not None:
            visibility = partial(
                tree_visibility, cache.lengths, ancestors, positions, cache.visible
            )
            masks = self._masks(visibility, on_host=True)
            attention = self.attention
            if of_kernel:
                assert self.tree_attention is not None
                attention = TREE[self.traits.attention]
                trees = TreePass.of(
                    ancestors, cache.lengths, list(masks.values()), self.tree_attention
                )
        device = self._device
        logits = self._run(
            cache, tokens.to(device), positions[:, -new:].to(device), masks, attention, trees, keep
        )
        cache.end_pass()
        return Decoded(logits)

    def forward_on_device(
        self,
        cache: TreeCache,
        tokens: Tensor,
        positions: Tensor,
        words: Tensor,
        lengths: Tensor,
        attended: int,
    ) -> Tensor:
        """Runs one pass over whole trees, all of N nodes, without a look at any number on the host.

        It computes what `forward` does, and counts nothing in the cache: that is for the caller,
        since what is recorded of a pass is repeated without this function.

        Args:
            cache: with room for N nodes behind its rows, and nothing pending.
            tokens: ``[B, N]`` int64; this and what follows on the model's device.
            positions: ``[B, N]`` int64, inside the model's table.
            words: ``[B, N, W]`` int32 of `pack_ancestors`.
            lengths: ``[B]`` int32 committed tokens.
            attended: slots attended over, at least ``max(lengths) + N``.

        Returns:
            ``[B, N, V]`` logits in the model's dtype.
        """
        batch_size, nodes = tokens.shape
        counts = torch.full((batch_size,), nodes, dtype=torch.int32, device=lengths.device)
        behind = torch.arange(nodes, device=lengths.device)

        def visibility(window: int | None) -> Tensor:
            return visible_slots(words, lengths, counts, attended, window).unsqueeze(1)

        masks = self._masks(visibility)
        trees, attention = None, self.attention
        if self.tree_attention is not None and nodes <= MAX_NODES:
            attention = TREE[self.traits.attention]
            trees = TreePass(words, lengths, counts, list(masks.values()), self.tree_attention)
        with cache.writing_to(lengths.long().unsqueeze(1) + behind, attended):
            return self._run(cache, tokens, positions, masks, attention, trees, None)

    def within_table(self, positions: Tensor) -> Tensor:
        """Returns positions that a learned table has; padding may stand past it, unseen."""
        limit = self.traits.positions
        if limit is not None and limit.kind == "learned":
            return positions.clamp(max=limit.num_positions - 1)
        return positions

    def _run(
        self,
        cache: TreeCache,
        tokens: Tensor,
        positions: Tensor,
        masks: dict[str, tuple[Tensor, int | None]],
        attention: str | None,
        trees: TreePass | None,
        keep: Tensor | None,
    ) -> Tensor:
        """Calls the model with tensors on its device; returns logits as `forward` does."""
        arguments: dict[str, Any] = {self._cache_argument: cache.hf_cache}
        if keep is not None and self._keeps_logits:
            arguments["logits_to_keep"] = keep.to(tokens.device)
        if trees is not None:
            arguments[ARGUMENT] = trees
        with self._pass(attention):
            logits: Tensor = self.model(
                input_ids=tokens,
                attention_mask=self._as_argument(masks),
                position_ids=positions,
                use_cache=True,
                return_dict=True,
                **arguments,
            ).logits
        if keep is not None and not self._keeps_logits:
            logits = logits[:, keep.to(logits.device)]
        return logits

    @contextmanager
    def _pass(self, attention: str | None) -> Iterator[None]:
        """Has the model run with layers of ours, and an attention of ours if one is given."""
        packed = self.packed.active() if self.packed is not None else nullcontext()
        with packed, attention_of(self._config, attention, self.traits.attention):
            yield

    def _masks(
        self, visibility: Callable[[int | None], Tensor], *, on_host: bool = False
    ) -> dict[str, tuple[Tensor, int | None]]:
        """Returns the masks of a pass and their windows by kind of layer.

        Args:
            visibility: gives ``[B, 1, N, S]`` bool for a window.
            on_host: whether on the host.
        """

        def mask(window: int | None) -> tuple[Tensor, int | None]:
            visible = visibility(window)
            if self.traits.attention == "eager" or self.attention is not None:
                visible = as_additive(visible, self._dtype, on_host=on_host)
            return visible.to(self._device), window

        if len(self.traits.layer_types) > 1:
            return {"full_attention": mask(None), "sliding_attention": mask(self.traits.window)}
        return {"": mask(self.traits.window)}

    @staticmethod
    def _as_argument(
        masks: dict[str, tuple[Tensor, int | None]],
    ) -> Tensor | dict[str, Tensor] | None:
        """Returns masks as models take them: one, one for each kind of layer, or none."""
        if len(masks) > 1:
            return {kind: mask for kind, (mask, _) in masks.items()}
        return masks[""][0] if masks else None


def causal_ancestors(batch_size: int, count: int) -> Tensor:
    """Returns ``[B, N, N]`` bool for a chain: node i sees the nodes up to itself."""
    chain = torch.ones(count, count, dtype=torch.bool).tril()
    return chain.expand(batch_size, count, count)


def token_matrix(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """Returns ``[B, width]`` int64, each row's tokens first and zeros behind them."""
    matrix = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        matrix[index, : len(row)] = row
    return torch.from_numpy(matrix)
