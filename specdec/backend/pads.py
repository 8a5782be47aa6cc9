"""Rows behind the nodes of a tree that hold no token: slots for what may come next.

They run in the same pass as the tree. No node sees them, so the nodes' logits are as without them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.backend.support import PositionLimit
from specdec.errors import ConfigError


class PassRows(NamedTuple):
    """The rows of one pass, in the form that `TreeModel.forward` takes.

    Attributes:
        tokens: ``[B, N]`` int64.
        positions: ``[B, N]`` int64.
        ancestors: ``[B, N, N]`` bool.
    """

    tokens: Tensor
    positions: Tensor
    ancestors: Tensor


class PadGroups:
    """A group of g PAD slots behind every node of a pass, with vectors in place of embeddings.

    Slot j of node v sees v's prefix and ancestors, v, and the slots up to itself of the same group;
    it stands at v's position + 1 + j. Its logits are a guess at the token after that position.

    Source: PaSS (arXiv 2311.13581), BiTA (arXiv 2401.12522) and PPD (arXiv 2405.18628); PPD gives
    only some nodes of a tree such slots.

    Args:
        model: a HuggingFace causal language model.
        vectors: ``[g, D]``, what the model's embedding module puts out for the slots; where a
            family scales embeddings inside that module they are the scaled ones.
        limit: where the model's positions end; slots stay below it.

    Raises:
        ConfigError: if the vectors are not of the model's width.
    """

    def __init__(self, model: Any, vectors: Tensor, limit: PositionLimit | None) -> None:
        self._embedding: torch.nn.Module = model.get_input_embeddings()
        width = int(self._embedding.embedding_dim)
        if vectors.ndim != 2 or len(vectors) == 0 or vectors.shape[1] != width:
            raise ConfigError(
                f"slots behind the nodes need vectors [g, {width}] of the width of the model's "
                f"embeddings, got {list(vectors.shape)}"
            )
        self._vectors = vectors
        self._limit = limit

    @property
    def size(self) -> int:
        """Slots of a group."""
        return len(self._vectors)

    def behind(self, positions: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
        """Returns positions ``[B, N * g]`` and ancestors ``[B, N * g, M + N * g]`` of the slots.

        Args:
            positions: ``[B, N]`` of the nodes.
            ancestors: ``[B, N, M]`` bool, what of the pending nodes each of them sees.
        """
        batch_size, nodes, _ = ancestors.shape
        ahead = positions.unsqueeze(2) + torch.arange(1, self.size + 1)
        if self._limit is not None:
            # further on, positions do not exist or change the model's frequencies for every row
            ahead = ahead.clamp(max=self._limit.num_positions - 1)
            ahead = torch.maximum(ahead, positions.unsqueeze(2))
        chain = torch.ones(self.size, self.size, dtype=torch.bool).tril()
        own = torch.kron(torch.eye(nodes, dtype=torch.bool), chain).expand(batch_size, -1, -1)
        seen = ancestors.repeat_interleave(self.size, dim=1)
        return ahead.flatten(1), torch.cat([seen, own], dim=2)

    def joined(self, tokens: Tensor, positions: Tensor, ancestors: Tensor) -> PassRows:
        """Returns the rows of trees ``[B, N]`` with their slots behind them: ``N * (1 + g)``."""
        slot_positions, slot_ancestors = self.behind(positions, ancestors)
        added = slot_positions.shape[1]
        return PassRows(
            pad(tokens, (0, added)),
            torch.cat([positions, slot_positions], dim=1),
            torch.cat([pad(ancestors, (0, added)), slot_ancestors], dim=1),
        )

    def split(self, rows: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
        """Returns of ``[B, N * (1 + g), V]`` the nodes ``[B, N, V]`` and slots ``[B, N, g, V]``."""
        slots = rows[:, nodes:].view(len(rows), nodes, self.size, rows.shape[2])
        return rows[:, :nodes], slots

    @contextmanager
    def entering(self, groups: int) -> Iterator[None]:
        """Puts the vectors in place of the embeddings of the last ``groups * g`` rows of a pass."""
        owner = threading.get_ident()  # a pass of another thread is none of ours

        def replace(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            if threading.get_ident() != owner:
                return None
            vectors = self._vectors.to(output.device, output.dtype).repeat(groups, 1)
            kept = output[:, : output.shape[1] - len(vectors)]
            return torch.cat([kept, vectors.expand(len(output), -1, -1)], dim=1)

        handle = self._embedding.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()
