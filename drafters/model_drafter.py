"""What drafters with a language model share: a law for each row, and one batched pass a level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import takewhile
from typing import cast

import torch
from torch import Tensor

from specdec.backend.cache import TreeCache
from specdec.backend.model import TreeModel, token_matrix
from specdec.drafters.base import BaseDrafter
from specdec.drafters.vocabulary_bridge import SharedVocabulary, VocabularyBridge
from specdec.trees.tree import DraftTree
from specdec.types import DraftContext, DraftLaw, LawRows

NO_ROW = -1


class ModelDrafter(BaseDrafter, ABC):
    """Asks a model through the same one-pass tree backend as the target.

    The nodes of one level of all rows' trees are one pass. What is at the root, and how the text
    before it comes into the cache, is the subclass's, in `_read_roots`. Where the model's positions
    end, and where the root cannot be read, its laws name no token: the step is plain decoding.
    """

    honest = True
    _backend: TreeModel
    _vocabulary: SharedVocabulary | VocabularyBridge
    _cache: TreeCache

    def __init__(self) -> None:
        self._laws: dict[int, ModelLaw] = {}  # of the rows that grow a tree in this step
        self._places: list[int] = []  # the row at each place of the cache, NO_ROW for none
        self._positions = torch.zeros(0, 0, dtype=torch.int64)  # of the pending nodes

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns the model's law behind the row's text."""
        law = ModelLaw(context)
        self._laws[context.row] = law
        return law

    @torch.no_grad()
    def expand(self, requests: Sequence[tuple[DraftLaw, Sequence[int]]]) -> list[LawRows]:
        """Runs one pass over the new nodes of all rows."""
        own = [(cast("ModelLaw", law), handles) for law, handles in requests]
        if any(not law.known for law, _ in own):
            self._read_roots()
        new = {
            law.row: [handle for handle in handles if handle not in law.known]
            for law, handles in own
        }
        if any(new.values()):
            self._read_nodes(new)
        return [law.rows(handles) for law, handles in own]

    def stop(self, row: int) -> None:
        """Forgets the row's law."""
        self._laws.pop(row, None)

    @abstractmethod
    def _read_roots(self) -> None:
        """Brings the cache up to the roots; makes every law know handle 0, sets `_places`."""

    def _read_nodes(self, new: dict[int, list[int]]) -> None:
        """Runs the nodes behind the handles; each sees its own ancestors."""
        pending = self._cache.pending
        handles: list[list[int]] = []
        paths: list[list[list[int]]] = []  # pending nodes on the way to each handle, itself last
        for place, row in enumerate(self._places):
            handles.append([])
            paths.append([])
            for handle in new.get(row, []):
                law = self._laws[row]
                path = law.places_to(handle, pending + len(handles[-1]))
                reached = self._in_reach(self._cache.lengths[place] + len(path))
                # other sources of a hybrid guess what this model cannot read, and go on behind it
                if not reached or law.is_behind_unread(handle) or not self._reads(law, handle):
                    self._know_nothing(law, handle)
                    continue
                law.places[handle] = path[-1]
                handles[-1].append(handle)
                paths[-1].append(path)
        width = max(map(len, handles))
        if width == 0:
            return
        ancestors = torch.zeros(len(handles), width, pending + width, dtype=torch.bool)
        ancestors[:, torch.arange(width), pending + torch.arange(width)] = True
        depths = torch.zeros(len(handles), width, dtype=torch.int64)
        tokens: list[list[int]] = []
        for place, row in enumerate(self._places):
            target_tokens = [self._laws[row].tokens[handle] for handle in handles[place]]
            tokens.append([self._vocabulary.draft_token(token) for token in target_tokens])
            for index, path in enumerate(paths[place]):
                depths[place, index] = len(path) - 1
                ancestors[place, index, path] = True
        logits = self._pass(tokens, depths, ancestors)
        for place, row in enumerate(self._places):
            if handles[place]:
                self._know(self._laws[row], handles[place], logits[place, : len(handles[place])])

    def _pass(
        self,
        tokens: list[list[int]],
        depths: Tensor,
        ancestors: Tensor | None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Returns logits of new nodes, `depths` ``[B, N]`` behind each row's committed ones."""
        positions = torch.tensor(self._cache.lengths).unsqueeze(1) + depths
        limit = self._backend.traits.positions
        if limit is not None:
            # padding only: tokens stay below the limit, where a model's frequencies may change
            positions = positions.clamp(max=limit.num_positions - 1)
        self._positions = torch.cat([self._positions, positions], dim=1)
        return self._backend.forward(
            self._cache, token_matrix(tokens, depths.shape[1]), self._positions, ancestors, keep
        )

    def _forget_positions(self) -> None:
        """Begins a new tree: nothing is pending."""
        self._positions = torch.zeros(self._cache.batch_size, 0, dtype=torch.int64)

    def _in_reach(self, count: int) -> bool:
        """Returns whether the model has positions for a text of `count` tokens."""
        limit = self._backend.traits.positions
        return limit is None or count <= limit.num_positions

    def _reads(self, law: ModelLaw, handle: int) -> bool:
        """Returns whether the model's vocabulary has the token at a handle."""
        return self._vocabulary.has(law.tokens[handle])

    def _know(self, law: ModelLaw, handles: Sequence[int], logits: Tensor) -> None:
        """Gives the law its rows at some handles, over the target's vocabulary."""
        scores = self._vocabulary.scores(logits)
        if law.warp is not None:
            scores = law.warp(scores)
        law.known.update(zip(handles, torch.log_softmax(scores, dim=-1), strict=True))

    def _know_nothing(self, law: ModelLaw, handle: int) -> None:
        """Gives the law a row that names no token at a handle that the model is not run at."""
        law.unread.add(handle)
        size = self._vocabulary.target_size
        law.known[handle] = torch.full((size,), -torch.inf, device=self._backend.device)


class ModelLaw:
    """One row's tree in the draft model: handles, their tokens, and where their states lie."""

    def __init__(self, context: DraftContext) -> None:
        self.row = context.row
        self.warp = context.warp
        self.target = context.target
        self._text = context.tokens
        self._length = len(context.tokens)
        self.tokens = [context.tokens[-1]]  # the target's, also where the draft model has others
        self._parents = [-1]
        self.known: dict[int, Tensor] = {}  # rows already computed
        self.places: dict[int, int] = {}  # pending node of each handle that was run
        self.unread: set[int] = set()  # handles that were not

    def text(self, start: int = 0) -> Sequence[int]:
        """Returns the row's tokens from `start` to the root, as they were when it was asked for."""
        return self._text[start : self._length]

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle for `parent` followed by `token`."""
        self.tokens.append(token)
        self._parents.append(parent)
        return len(self.tokens) - 1

    def rows(self, handles: Sequence[int]) -> LawRows:
        """Returns the rows at handles that have been computed."""
        return LawRows(torch.stack([self.known[handle] for handle in handles]))

    def is_behind_unread(self, handle: int) -> bool:
        """Returns whether the model was not run at the node above a handle."""
        return self._parents[handle] in self.unread

    def places_to(self, handle: int, place: int) -> list[int]:
        """Returns the pending nodes from the root (if it is one) down to `handle`, at `place`."""
        path = [place]
        while handle > 0:
            handle = self._parents[handle]
            if handle in self.places:
                path.append(self.places[handle])
        return path[::-1]

    def run_along(self, tree: DraftTree, path: Sequence[int]) -> list[int]:
        """Returns the handles along a path of the tree, as far as they were run."""
        handles = tree.handles or ()
        return list(takewhile(lambda h: h in self.places, (handles[node] for node in path)))
