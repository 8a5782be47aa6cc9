"""One pass of a HuggingFace model over a padded batch of trees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from specdec.backend.attention import GROUPED, attention_of, pays
from specdec.backend.cache import LayerSpec, TreeCache
from specdec.backend.masks import as_additive, tree_visibility
from specdec.backend.packed import PackedLinears
from specdec.backend.support import ModelTraits, read_traits
from specdec.backend.tree_layers import ARGUMENT, MAX_NODES, TREE, TreePass


class TreeModel:
    """A model that can be asked for the logits of trees.

    It holds no state of a call: the cache is made by `new_cache` and handed in. The model is
    changed only while a pass runs: packed weights stand in for its linear layers then.

    Args:
        model: a HuggingFace causal language model with attn_implementation "sdpa" or "eager".
        tree_attention: implementation of `specdec.kernels.tree_attention` for the passes over
            trees; None for the model's own attention under a mask.

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
        self._config = model.config.get_text_config(decoder=True)
        self._keeps_logits: bool = model._supports_logits_to_keep()

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        table = self.model.get_input_embeddings()
        device: torch.device = table.weight.device
        if device.type == "meta":  # offloaded by accelerate: it runs where its hook says
            device = torch.device(getattr(table._hf_hook, "execution_device", "cpu"))
        return device

    def new_cache(self, batch_size: int, capacity: int) -> TreeCache:
        """Returns an empty cache for `batch_size` rows of `capacity` slots."""
        if self.packed is not None:
            self.packed.refresh()
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
        device = self.device
        limit = self.traits.positions
        if limit is not None and limit.kind == "learned":
            # padding may stand past the end of the table; nobody looks at it
            positions = positions.clamp(max=limit.num_positions - 1)
        new = tokens.shape[1]
        cache.begin_pass(new)
        arguments: dict[str, Any] = {}
        if keep is not None and self._keeps_logits:
            arguments["logits_to_keep"] = keep.to(device)
        masks = self._masks(cache, positions, ancestors)
        # the kernel's queries are whole trees; what goes on with one, or a long prompt, is not
        as_tree = ancestors is not None and new == ancestors.shape[2] <= MAX_NODES
        attention = self.attention if ancestors is not None else None
        if self.tree_attention is not None and ancestors is not None and as_tree:
            attention = TREE[self.traits.attention]
            arguments[ARGUMENT] = TreePass(
                ancestors, cache.lengths, list(masks.values()), self.tree_attention
            )
        with self._pass(attention):
            logits: Tensor = self.model(
                input_ids=tokens.to(device),
                attention_mask=self._as_argument(masks),
                position_ids=positions[:, -new:].to(device),
                past_key_values=cache.hf_cache,
                use_cache=True,
                return_dict=True,
                **arguments,
            ).logits
        cache.end_pass()
        if keep is not None and not self._keeps_logits:
            logits = logits[:, keep.to(logits.device)]
        return logits

    @contextmanager
    def _pass(self, attention: str | None) -> Iterator[None]:
        """Has the model run with our linear layers, and an attention of ours if one is given."""
        packed = self.packed.active() if self.packed is not None else nullcontext()
        with packed, attention_of(self._config, attention, self.traits.attention):
            yield

    def _masks(
        self, cache: TreeCache, positions: Tensor, ancestors: Tensor | None
    ) -> dict[str, tuple[Tensor, int | None]]:
        """Returns the masks of a pass and their windows by kind of layer; none for a causal one."""
        if ancestors is None:
            return {}

        def mask(window: int | None) -> tuple[Tensor, int | None]:
            visible = tree_visibility(cache.lengths, ancestors, positions, cache.visible, window)
            if self.traits.attention == "eager" or self.attention is not None:
                visible = as_additive(visible, self.model.dtype)
            return visible.to(self.device), window

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
    matrix = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        matrix[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return matrix
