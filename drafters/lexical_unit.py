"""The target guesses the tokens after the next one itself, at slots behind the text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from specdec.backend.model import TreeModel
from specdec.backend.packed import already_packed
from specdec.backend.pads import PadGroups
from specdec.backend.probe import probed
from specdec.drafters.base import BaseDrafter
from specdec.drafters.checkpoint import load_checkpoint, shipped
from specdec.errors import ConfigError, StateError
from specdec.kernels.top_k_rows import top_k_rows
from specdec.types import (
    DraftContext,
    DrafterNeeds,
    DraftLaw,
    LawRows,
    PromptRows,
    StepOutcome,
    TargetCache,
    TargetInfo,
)

KIND = "lexical_unit"
_SHORTLIST = 64  # tokens of a slot's law that are handed on; no policy looks at more
_TABLE_ROWS = 8192  # of an embedding, looked up at a time

Warp = Callable[[Tensor], Tensor]


class LexicalUnit(BaseDrafter):
    """Drafts the coming lexical unit from PAD slots that the target itself runs.

    Behind the context stand g PAD slots, trained vectors in place of token embeddings; slot j is
    the frozen target's guess at the token that comes j + 2 positions later. There are two forms:

    In one pass: every node of a tree has its slots behind it in the verifying pass. Those of the
    last accepted node are the next draft, so drafting costs no pass, only rows. The slots do not
    know the token that the verifier put behind that node: slot 0's guess at depth 1 is an average
    over it.

    In two passes: the root and its slots are a pass of their own before the tree is grown. Depth 1
    is then the target's true law and slot j answers for depth 2 + j, at the price of a second pass
    of the whole target for each step, which counts as drafting: block efficiency says nothing about
    it. It shows what a unit is worth; it is not the faster form.

    Either way the laws are marginals of a depth, whatever path leads there, and known before any
    token is chosen. A unit ends in front of the first depth whose most probable token has less than
    `confidence`: a rule about the law, never about a token drawn from it, so that drawn tokens stay
    lossless too (keeping a drawn token only if it is probable itself would not be).

    Source: Lexical Unit Decoding (arXiv 2405.15208), which tunes the model and accepts units by
    their probability. Here the model is frozen, only the vectors behind the text are trained, as in
    PPD (arXiv 2405.18628) and BiTA (arXiv 2401.12522), and the verifier decides. No LoRA runs on
    the slots, which would let them do more (arXiv 2507.11851).

    Args:
        weights: a folder written by `specdec.training.lexical_unit`; None for the weights that come
            with the toolkit for this target. Without any it is an error: the untrained form, which
            guesses badly, is drafted with only where it is asked for.
        untrained_pads: leaves out weights: this many slots, each the mean of the target's
            embeddings. For SmolLM2 that guesses far better than the embedding of an unused token.
        one_pass: which form.
        confidence: beta, 0 to 1; 0 leaves the length to the policy.
    """

    name = KIND

    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        *,
        untrained_pads: int | None = None,
        one_pass: bool = True,
        confidence: float = 0.0,
    ) -> None:
        if weights is not None and untrained_pads is not None:
            raise ConfigError("give weights or untrained_pads, not both")
        if untrained_pads is not None and untrained_pads < 1:
            raise ConfigError(f"untrained_pads must be at least 1, got {untrained_pads}")
        if not 0.0 <= confidence <= 1.0:
            raise ConfigError(f"confidence must be from 0 to 1, got {confidence}")
        self._weights = weights
        self._untrained_pads = untrained_pads
        self._one_pass = one_pass
        self._confidence = confidence
        self._behind: dict[int, Tensor] = {}  # slots' logits [g, V] behind each row's last node
        self._asked: dict[int, _Asked] = {}  # rows that a draft pass is to serve
        self._backend: TreeModel
        self._pads: PadGroups

    def attach(self, target: TargetInfo) -> None:
        """Reads the slots' vectors for the target.

        Raises:
            ConfigError: if the model is not known, or no weights come with the toolkit for it.
            StateError: if the weights are damaged or another target's.
        """
        if target.model is None:
            raise ConfigError(
                "lexical_unit drafts with the target itself: give it to a SpeculativeGenerator, "
                "which hands it the model"
            )
        vectors = self._vectors(target)
        self.reset()
        self.needs = DrafterNeeds(probes=vectors if self._one_pass else None)
        if not self._one_pass:
            self._backend = probed(target.model, packed_weights=None)
            self._backend.packed = already_packed(target.model)
            self._pads = PadGroups(target.model, vectors, self._backend.traits.positions)

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Keeps what the slots behind the prompt say."""
        self._keep(row, None if prompt_rows is None else prompt_rows.probes)

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns one law a depth for the unit behind the row's text."""
        law = UnitLaw(self._confidence)
        if not self._one_pass:
            if context.target is None:
                raise ConfigError(
                    "lexical_unit in two passes reads the target's cache, which this context does "
                    "not have"
                )
            root = context.tokens[-1]
            self._asked[context.row] = _Asked(law, root, context.target, context.warp)
        elif context.row in self._behind:
            law.learn(self._behind.pop(context.row), context.warp)
        return law

    def expand(self, requests: Sequence[tuple[DraftLaw, Sequence[int]]]) -> list[LawRows]:
        """Answers from the slots; in two passes, runs them first for all rows at once."""
        if self._asked:
            self._run_slots()
        return [cast("UnitLaw", law).rows(handles) for law, handles in requests]

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Keeps what the slots behind the last accepted nodes say."""
        for outcome in outcomes:
            self._asked.pop(outcome.row, None)
            last = outcome.path[-1] if outcome.path else 0
            self._keep(outcome.row, None if outcome.probes is None else outcome.probes[last])

    def stop(self, row: int) -> None:
        """Forgets the row's slots."""
        self._behind.pop(row, None)
        self._asked.pop(row, None)

    def reset(self) -> None:
        """Forgets all rows; there is nothing learned."""
        self._behind.clear()
        self._asked.clear()

    def _keep(self, row: int, logits: Tensor | None) -> None:
        self._behind.pop(row, None)
        if logits is not None:
            self._behind[row] = logits.clone()  # the pass they are a part of need not outlast it

    @torch.no_grad()
    def _run_slots(self) -> None:
        """Runs the roots and their slots behind what the target has committed."""
        asked, self._asked = list(self._asked.values()), {}
        cache = asked[0].target.cache
        pending, size = cache.pending, cache.batch_size  # another drafter's nodes stay
        tokens = torch.zeros(size, 1, dtype=torch.int64)
        for row in asked:
            tokens[row.target.place] = row.root
        positions = torch.tensor(cache.lengths).unsqueeze(1)
        rows = self._pads.joined(tokens, positions, torch.ones(size, 1, 1, dtype=torch.bool))
        others = torch.zeros(size, rows.tokens.shape[1], pending, dtype=torch.bool)
        with self._pads.entering(1):
            logits = self._backend.forward(
                cache,
                rows.tokens,
                torch.cat([positions.expand(-1, pending), rows.positions], dim=1),
                torch.cat([others, rows.ancestors], dim=2),
            )
        cache.drop_pending(keep=pending)
        for row in asked:
            row.law.learn(logits[row.target.place], row.warp)

    def _vectors(self, target: TargetInfo) -> Tensor:
        """Returns the ``[g, D]`` vectors of the slots."""
        table = target.model.get_input_embeddings()
        if self._untrained_pads is not None:
            return mean_embedding(target.model, target.device).repeat(self._untrained_pads, 1)
        folder = self._weights if self._weights is not None else shipped(KIND, target.model)
        tensors = load_checkpoint(folder, KIND, target.model).tensors
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        shape = found.get("pads", [])
        if len(found) != 1 or len(shape) != 2 or shape[0] < 1 or shape[1] != table.embedding_dim:
            raise StateError(
                f"{folder} should hold one tensor 'pads' [slots, {table.embedding_dim}] of the "
                f"width of the target's embeddings, got {found}"
            )
        return tensors["pads"].to(target.device or "cpu", target.model.dtype)


class UnitLaw:
    """One row of probabilities a depth, the same at every node of that depth.

    Args:
        confidence: the unit ends in front of a depth whose most probable token has less.
    """

    def __init__(self, confidence: float) -> None:
        self._confidence = confidence
        self._depths = [0]
        self._laws: LawRows | None = None
        self._length = 0

    def learn(self, logits: Tensor, warp: Warp | None) -> None:
        """Takes ``[depths, V]`` raw logits, the first of depth 1; the warp may overwrite them."""
        scores = logits if logits.dtype == torch.float64 else logits.float()
        log_probs = torch.log_softmax(scores if warp is None else warp(scores), dim=-1)
        values, ids = top_k_rows(log_probs, min(_SHORTLIST, log_probs.shape[1]))
        values, ids = values.cpu(), ids.cpu()
        self._laws = LawRows(values, ids.masked_fill(values == -torch.inf, -1))
        sure = (values[:, 0].exp() >= self._confidence).tolist()
        self._length = sure.index(False) if False in sure else len(sure)

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle for `parent` followed by `token`."""
        self._depths.append(self._depths[parent] + 1)
        return len(self._depths) - 1

    def rows(self, handles: Sequence[int]) -> LawRows:
        """Returns the laws of the handles' depths, most probable tokens first."""
        depths = [self._depths[handle] for handle in handles]
        if self._laws is None or self._laws.ids is None:
            return LawRows(
                torch.full((len(depths), 1), -torch.inf), torch.full((len(depths), 1), -1)
            )
        index = torch.tensor([min(depth, len(self._laws.log_probs) - 1) for depth in depths])
        values, ids = self._laws.log_probs[index], self._laws.ids[index]
        ended = torch.tensor([depth >= self._length for depth in depths])
        values[ended], ids[ended] = -torch.inf, -1
        return LawRows(values, ids)


class _Asked(NamedTuple):
    law: UnitLaw
    root: int
    target: TargetCache
    warp: Warp | None


@torch.no_grad()
def mean_embedding(model: Any, device: torch.device | None) -> Tensor:
    """Returns ``[D]``: the mean of what a model's embedding module puts out, in its dtype."""
    table = model.get_input_embeddings()
    total = torch.zeros(table.embedding_dim, dtype=torch.float64, device=device)
    size: int = table.num_embeddings
    for begin in range(0, size, _TABLE_ROWS):
        ids = torch.arange(begin, min(begin + _TABLE_ROWS, size), device=device)
        total += table(ids).double().sum(0)
    mean: Tensor = (total / size).to(table.weight.dtype)
    return mean
