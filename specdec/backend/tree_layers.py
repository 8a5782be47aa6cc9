"""`specdec.kernels.tree_attention` in the attention layers of a HuggingFace model.

transformers calls whatever is registered under the name in a model's configuration, with the mask
that the model was given. A pass over a tree gives every layer a plain mask as before, and beside it
what the kernel wants: words of ancestor bits and lengths. Which window a layer has is told by the
mask that it was handed, so that no family's own names matter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from specdec.kernels.tree_attention import IMPLEMENTATIONS, tree_attention
from specdec.kernels.tree_mask import pack_ancestors

TREE = {"sdpa": "specdec_tree", "eager": "specdec_tree_eager"}  # by the model's own attention
ARGUMENT = "specdec_tree_pass"
MAX_NODES = 128
KNOWN_IMPLS = ("auto", *IMPLEMENTATIONS)
# what layers may hand over that the kernel has no room for
_FOREIGN = ("position_bias", "head_mask", "cu_seq_lens_q", "relative_attention_bias")


class NotServedError(RuntimeError):
    """The kernel cannot serve a layer, and the model's own eager attention is not ours to call."""


class TreePass:
    """What one pass over a batch of trees hands the attention of every layer.

    Args:
        words: ``[B, N, W]`` int32 of `pack_ancestors`.
        lengths: ``[B]`` int32 committed tokens of each row, all before the tree.
        nodes: ``[B]`` int32 nodes of each row's tree.
        windows: each mask that layers are given, and the sliding window it stands for.
        impl: of `tree_attention`.
    """

    def __init__(
        self,
        words: Tensor,
        lengths: Tensor,
        nodes: Tensor,
        windows: Sequence[tuple[Tensor, int | None]],
        impl: str,
    ) -> None:
        self.impl = impl
        self._given = (words, lengths, nodes)
        self._windows = list(windows)
        self._by_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def of(
        cls,
        ancestors: Tensor,
        lengths: Sequence[int],
        windows: Sequence[tuple[Tensor, int | None]],
        impl: str,
    ) -> TreePass:
        """Returns the pass of trees given by ``[B, N, N]`` bool: whom each node sees, itself too.

        Rows of smaller trees are filled up with nodes that see the prefix and themselves.
        """
        batch_size, nodes, _ = ancestors.shape
        return cls(
            pack_ancestors(ancestors.cpu()),
            torch.tensor(lengths, dtype=torch.int32),
            torch.full((batch_size,), nodes, dtype=torch.int32),
            windows,
            impl,
        )

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns words ``[B, N, W]``, lengths and nodes ``[B]`` there; copied once a device."""
        if device not in self._by_device:
            words, lengths, nodes = (t.to(device, non_blocking=True) for t in self._given)
            self._by_device[device] = (words, lengths, nodes)
        return self._by_device[device]

    def knows(self, mask: Tensor | None) -> bool:
        """Returns whether a mask is one of this pass's, as it was handed to the model."""
        return mask is not None and any(_same(mask, own) for own, _ in self._windows)

    def window(self, mask: Tensor) -> int | None:
        """Returns the sliding window of a known mask; None for none."""
        return next(window for own, window in self._windows if _same(mask, own))


def tree_layer(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    own: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attends by `tree_attention`, or as the model does where the kernel has no room.

    Args:
        module: the attention layer.
        query: ``[B, Hq, N, D]``.
        key: ``[B, Hkv, S, D]``, the tree's own at each row's slots behind its prefix.
        value: ``[B, Hkv, S, D]``.
        attention_mask: ``[B, 1, N, S]``, one of the masks of the `TreePass`.
        dropout: probability, 0 outside training.
        scaling: factor of the scores, None for ``D ** -0.5``.
        is_causal: as "sdpa" takes it.
        own: the model's attention, "sdpa" or "eager".
        **kwargs: of the model, the `TreePass` among them; `softcap` and `s_aux` (sinks) are taken
            into account.

    Returns:
        ``[B, N, Hq, D]``, and None in place of weights.

    Raises:
        NotServedError: if the kernel cannot serve a model whose own attention is "eager".
    """
    trees: TreePass | None = kwargs.pop(ARGUMENT, None)
    reason = _obstacle(trees, query, key, value, attention_mask, dropout, kwargs)
    if reason is not None:
        if own == "eager":
            raise NotServedError(f"{type(module).__name__}: {reason}")
        warnings.warn(
            f"{type(module).__name__} does without specdec's tree attention: {reason}", stacklevel=1
        )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    assert trees is not None
    assert attention_mask is not None
    words, lengths, nodes = trees.on(query.device)
    output = tree_attention(
        query,
        key,
        value,
        words,
        lengths,
        nodes,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=trees.window(attention_mask),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        impl=trees.impl,
        check_values=False,  # ours, and to read them waits for the device in every layer
    )
    return output.transpose(1, 2).contiguous(), None


def _obstacle(
    trees: TreePass | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> str | None:
    """Returns why the kernel cannot serve a layer; None if it can."""
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:
        return f"the layer hands over {', '.join(foreign)}"
    if trees is None:
        return "the model does not pass on arguments that it does not know"
    if not trees.knows(mask):
        return "the model makes a mask of its own, or moves ours to another device"
    if dropout:
        return "it is in training mode"
    if value.shape != key.shape or query.shape[-1] != key.shape[-1]:
        return f"keys of shape {tuple(key.shape)} and values of shape {tuple(value.shape)}"
    return None


def _same(mask: Tensor, own: Tensor) -> bool:
    return mask.data_ptr() == own.data_ptr() and mask.shape == own.shape


for _own, _name in TREE.items():
    _forward: Callable[..., Any] = partial(tree_layer, own=_own)
    AttentionInterface.register(_name, _forward)
