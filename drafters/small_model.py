"""A smaller language model as drafter, through the same one-pass tree backend as the target."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.backend.cache import TreeCache
from specdec.backend.model import causal_ancestors, token_matrix
from specdec.backend.probe import probed
from specdec.drafters.base import BaseDrafter
from specdec.errors import ConfigError
from specdec.trees.tree import DraftTree
from specdec.types import (
    DraftContext,
    DraftLaw,
    LawRows,
    PromptRows,
    StepOutcome,
    TargetInfo,
)

_PADDING_SHARE = 0.01  # tables of one tokenizer are padded to different multiples


class SmallModel(BaseDrafter):
    """Drafts with any smaller HuggingFace causal language model of the same tokenizer.

    A level of the trees of all rows is one batched pass. Accepted nodes keep their place in the
    draft model's cache, so a step feeds it nothing but the tokens it has not seen. It drafts with
    the user's own temperature and truncations, applied once: a model that drafts for itself is
    always right.

    Source: Leviathan et al. (arXiv 2211.17192) for one chain; SpecInfer (arXiv 2305.09781) for
    trees.

    Args:
        model: the draft model; `attn_implementation` "sdpa" or "eager".
        tokenizer: not supported yet: the draft model must have the target's tokenizer.

    Raises:
        UnsupportedModelError: if the model cannot take trees.
    """

    name = "small_model"
    honest = True

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        if tokenizer is not None:
            raise ConfigError(
                "drafting with another tokenizer is not supported yet; leave `tokenizer` out if "
                "the draft model has the target's"
            )
        self._backend = probed(model)
        self._vocab_size = 0
        self.reset()

    def attach(self, target: TargetInfo) -> None:
        """Checks that the two vocabularies are one, up to padding."""
        own = self._backend.traits.vocab_size
        if abs(own - target.vocab_size) > _PADDING_SHARE * target.vocab_size:
            raise ConfigError(
                f"the draft model has {own} tokens, the target {target.vocab_size}: their "
                "tokenizers do not fit"
            )
        self._vocab_size = target.vocab_size

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Begins a row; the draft model reads the prompt when the first tree is wanted."""
        self._waiting.append(row)

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns the draft model's law behind the row's text."""
        law = _ModelLaw(context)
        self._laws[context.row] = law
        return law

    @torch.no_grad()
    def expand(self, requests: Sequence[tuple[DraftLaw, Sequence[int]]]) -> list[LawRows]:
        """Runs one pass over the new nodes of all rows."""
        own = [(cast("_ModelLaw", law), handles) for law, handles in requests]
        wanted = {law.row: (law, handles) for law, handles in own}
        if any(not law.known for law, _ in wanted.values()):
            self._read_text()
        new = {
            row: [handle for handle in handles if handle not in law.known]
            for row, (law, handles) in wanted.items()
        }
        if any(new.values()):
            self._read_nodes(new)
        return [
            LawRows(torch.stack([law.known[handle] for handle in handles]))
            for law, handles in wanted.values()
        ]

    def observe(self, outcome: StepOutcome) -> None:
        """Notes which of the drafted nodes became text."""
        law = self._laws.get(outcome.row)
        if law is not None:
            self._kept[outcome.row] = law.places_of(outcome.tree, outcome.path)

    def stop(self, row: int) -> None:
        """Takes the row out of the draft model's batch."""
        self._laws.pop(row, None)
        if row in self._waiting:
            self._waiting.remove(row)
        if row not in self._places:
            return
        self._commit()
        place = self._places.index(row)
        self._cache.retire(place)
        self._places[place] = self._places[-1]
        self._places.pop()

    def reset(self) -> None:
        """Drops all rows; there is nothing learned."""
        self._waiting: list[int] = []
        self._places: list[int] = []  # the row at each place of the cache
        self._laws: dict[int, _ModelLaw] = {}
        self._kept: dict[int, list[int]] = {}
        self._cache: TreeCache
        self._positions = torch.zeros(0, 0, dtype=torch.int64)

    def _commit(self) -> None:
        """Keeps the accepted nodes of the last step in the cache."""
        self._cache.commit([self._kept.get(row, []) for row in self._places])
        self._kept.clear()

    def _read_text(self) -> None:
        """Brings the cache up to date with every row's text, its root included."""
        if self._waiting:
            self._places, self._waiting = self._waiting, []
            self._cache = self._backend.new_cache(len(self._places), capacity=256)
        self._commit()
        laws = [self._laws.get(row) for row in self._places]
        tails = [
            law.text()[length:] if law else []
            for law, length in zip(laws, self._cache.lengths, strict=True)
        ]
        width = max(map(len, tails))
        self._positions = torch.zeros(len(tails), 0, dtype=torch.int64)
        # padding shares the last position: a longer one may change a model's frequencies
        depths = [[min(i, max(len(tail) - 1, 0)) for i in range(width)] for tail in tails]
        logits = self._pass(tails, causal_ancestors(len(tails), width), torch.tensor(depths))
        for place, (law, tail) in enumerate(zip(laws, tails, strict=True)):
            if law is not None and tail:
                self._know(law, [0], logits[place, len(tail) - 1 : len(tail)])
        self._cache.advance([len(tail) for tail in tails])
        self._positions = torch.zeros(len(tails), 0, dtype=torch.int64)

    def _read_nodes(self, new: dict[int, list[int]]) -> None:
        """Runs the nodes behind the handles; each sees its own ancestors."""
        pending = self._cache.pending
        handles = [new.get(row, []) for row in self._places]
        width = max(map(len, handles))
        ancestors = torch.zeros(len(handles), width, pending + width, dtype=torch.bool)
        ancestors[:, torch.arange(width), pending + torch.arange(width)] = True
        depths = torch.zeros(len(handles), width, dtype=torch.int64)
        tokens: list[list[int]] = []
        for place, row in enumerate(self._places):
            law = self._laws.get(row)
            tokens.append([law.tokens[handle] for handle in handles[place]] if law else [])
            for index, handle in enumerate(handles[place]):
                assert law is not None
                law.places[handle] = pending + index
                path = law.path(handle)
                depths[place, index] = len(path) - 1
                ancestors[place, index, [law.places[node] for node in path]] = True
        logits = self._pass(tokens, ancestors, depths)
        for place, row in enumerate(self._places):
            if handles[place]:
                self._know(self._laws[row], handles[place], logits[place, : len(handles[place])])

    def _pass(self, tokens: list[list[int]], ancestors: Tensor, depths: Tensor) -> Tensor:
        lengths = torch.tensor(self._cache.lengths).unsqueeze(1)
        self._positions = torch.cat([self._positions, lengths + depths], dim=1)
        width = depths.shape[1]
        return self._backend.forward(
            self._cache, token_matrix(tokens, width), self._positions, ancestors
        )

    def _know(self, law: _ModelLaw, handles: Sequence[int], logits: Tensor) -> None:
        """Gives the law its rows at some handles, over the target's vocabulary."""
        common = min(self._vocab_size, logits.shape[-1])
        scores = logits[:, :common].to(torch.float32, copy=True)
        if law.warp is not None:
            scores = law.warp(scores)
        rows = pad(
            torch.log_softmax(scores, dim=-1), (0, self._vocab_size - common), value=-torch.inf
        )
        law.known.update(zip(handles, rows, strict=True))


class _ModelLaw:
    """One row's tree in the draft model: handles, their tokens, and where their states lie."""

    def __init__(self, context: DraftContext) -> None:
        self.row = context.row
        self.warp = context.warp
        self._text = context.tokens
        self._length = len(context.tokens)
        self.tokens = [context.tokens[-1]]
        self._parents = [-1]
        self.known: dict[int, Tensor] = {}  # rows already computed
        self.places: dict[int, int] = {}  # pending node of each handle that was run

    def text(self) -> list[int]:
        """Returns the row's tokens when the law was asked for, the root last."""
        return list(self._text[: self._length])

    def extend(self, parent: int, token: int) -> int:
        self.tokens.append(token)
        self._parents.append(parent)
        return len(self.tokens) - 1

    def rows(self, handles: Sequence[int]) -> LawRows:
        return LawRows(torch.stack([self.known[handle] for handle in handles]))

    def path(self, handle: int) -> list[int]:
        """Returns the handles from the first level down to `handle`."""
        path = []
        while handle > 0:
            path.append(handle)
            handle = self._parents[handle]
        return path[::-1]

    def places_of(self, tree: DraftTree, path: Sequence[int]) -> list[int]:
        """Returns the pending nodes along a path of the tree, as far as they were run."""
        handles = tree.handles or ()
        run = takewhile(lambda handle: handle in self.places, (handles[node] for node in path))
        return [self.places[handle] for handle in run]
