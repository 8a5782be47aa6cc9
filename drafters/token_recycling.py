"""Token recycling: the target's discarded guesses, kept as an adjacency matrix of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from specdec.drafters.calibration import Calibration
from specdec.drafters.learning import LearnedState, LearningDrafter
from specdec.drafters.listed_law import ListedLaw, at_most_certain
from specdec.drafters.native_drafter import NativeDrafter
from specdec.drafters.native_table import NativeTable
from specdec.drafters.pair_store import NO_TOKEN
from specdec.drafters.scored_nodes import ScoredNodes
from specdec.drafters.slots import Slots, log_shares_of
from specdec.errors import ConfigError, StateError
from specdec.kernels import drafting
from specdec.types import (
    DraftContext,
    DrafterNeeds,
    DraftLaw,
    Guesses,
    PromptRows,
    StepOutcome,
    TargetInfo,
)


class TokenRecycling(LearningDrafter):
    """Remembers, for each token, the target's k best successors the last time it was scored.

    Every node of every tree writes its row, accepted or not, and so does every prompt position;
    a later row replaces an earlier one. The next tree follows the rows from the root.

    Source: Luo et al., "Turning Trash into Treasure" (arXiv 2408.08696). Where we differ: rows
    never seen give no children (the paper's code drafts token 0); of two nodes with one token the
    last on the accepted path wins (undefined there); prompt positions are recycled too; and
    beside each id we keep its share among the survivors in float16, from which the chance that
    the guess is right is estimated by counting, so trees can be grown best first. At a vocabulary
    of 32k the matrix takes 1.5 MB.

    Rows of a batch, and calls, share the matrix: it changes which guesses are made, never the text.

    Args:
        num_successors: k, the entries of a row.
        prompt_rows: recycle the prompt's positions too. The paper does not; it pays on text that
            repeats its prompt and costs the language-model head at every prompt position.
    """

    name = "token_recycling"

    def __init__(self, num_successors: int = 8, prompt_rows: bool = True) -> None:
        if num_successors < 1:
            raise ConfigError(f"num_successors must be at least 1, got {num_successors}")
        self._k = num_successors
        self.needs = DrafterNeeds(
            prompt_top_k=num_successors if prompt_rows else 0,
            node_top_k=num_successors,
            every_step=False,
        )
        self._make_matrix(0, Calibration(num_successors))

    def attach(self, target: TargetInfo) -> None:
        """Makes the matrix for a vocabulary; keeps a learned one that already fits."""
        if self._k > target.vocab_size:
            raise ConfigError(
                f"num_successors is {self._k}, but the vocabulary has {target.vocab_size} tokens"
            )
        if len(self._successors) == 0:
            self._make_matrix(target.vocab_size, self._calibration)
        elif len(self._successors) != target.vocab_size:
            raise ConfigError(
                f"this token_recycling matrix was learned for {len(self._successors)} tokens, the "
                f"target has {target.vocab_size}; make a new drafter or call reset()"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self._successors.nbytes + self._log_shares.nbytes

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Writes the prompt's rows."""
        if prompt_rows is not None:
            count = len(prompt_rows.ids)
            self._write(prompt[-count:], prompt_rows.ids, prompt_rows.logits, range(count))

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns the law that follows the matrix from the root."""
        if self._native is not None:
            return self._native.law(NO_TOKEN, context.tokens[-1])
        return _MatrixLaw(self, context.tokens[-1])

    def native(self, context: DraftContext) -> NativeDrafter | None:
        """See `specdec.drafters.native_drafter.HasNative`."""
        if self._native is None or type(self) is not TokenRecycling:
            return None
        return NativeDrafter([self._native.source(0, lambda _: None)])

    def guesses(self, token: int) -> Guesses:
        """Returns a token's row: ids, and the estimated chance that each is the next token."""
        ids, share_bits = self._slots.row(token)
        return Guesses(ids, at_most_certain(self._calibration.chances(share_bits)))

    def most(self, token: int) -> float:
        """Returns what no chance of `guesses` exceeds."""
        return self._calibration.most(self._slots.row(token)[1])

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Counts which guesses were right, then recycles every node's logits."""
        scored = ScoredNodes.of(outcomes, self._k)
        if self._native is not None:
            self._native.learn(scored, [NO_TOKEN] * len(scored.tokens))
            return
        for node, emitted in zip(scored.visited, scored.emitted, strict=True):
            row = self._slots.row(scored.tokens[node])
            for rank, (guess, bits) in enumerate(zip(*row, strict=True)):
                self._calibration.record(rank, bits, guess == emitted)
        self._write(scored.tokens, scored.ids, scored.logits, scored.order)

    def reset(self) -> None:
        """Forgets the matrix and the calibration."""
        self._make_matrix(len(self._successors), Calibration(self._k))

    def state(self) -> LearnedState:
        """Returns the matrix and the calibration; the vocabulary and k are in their shapes."""
        return LearnedState(
            {
                "successors": self._successors,
                "log_shares": self._log_shares,
                **self._calibration.state().arrays,
            }
        )

    def restore(self, state: LearnedState) -> None:
        """Takes over a matrix; it must be of this k, and of the target's vocabulary if attached."""
        rows = len(self._successors) or -1
        successors = state.array("successors", (rows, self._k), np.int32)
        if successors.max(initial=-1) >= len(successors) or successors.min(initial=-1) < -1:
            raise StateError("table 'successors' holds ids that are not in its vocabulary")
        log_shares = state.array("log_shares", successors.shape, np.float16)
        calibration = Calibration.restored(state, self._k)
        self._make_matrix(len(successors), calibration)
        self._successors[:], self._log_shares[:] = successors, log_shares

    def _make_matrix(self, vocab_size: int, calibration: Calibration) -> None:
        """Makes an empty matrix, and what reads its rows."""
        self._successors = np.full((vocab_size, self._k), -1, dtype=np.int32)
        self._log_shares = np.full((vocab_size, self._k), -np.inf, dtype=np.float16)
        self._slots = Slots(self._successors, self._log_shares)
        self._calibration = calibration
        self._native: NativeTable | None = None
        if drafting.serves():
            self._native = NativeTable(self._successors, self._log_shares, [calibration])

    def _write(
        self, tokens: Sequence[int], ids: Tensor, logits: Tensor, order: Iterable[int]
    ) -> None:
        last = {tokens[place]: place for place in order}
        index, source = list(last.keys()), list(last.values())
        self._successors[index] = ids[source].numpy()
        self._log_shares[index] = log_shares_of(logits[source])


class _MatrixLaw(ListedLaw):
    """A handle stands for its token: the matrix knows no longer context."""

    def __init__(self, drafter: TokenRecycling, root: int) -> None:
        self._drafter = drafter
        self._tokens = [root]
        self._known: dict[int, Guesses] = {}  # many branches come by the same token

    def extend(self, parent: int, token: int) -> int:
        self._tokens.append(token)
        return len(self._tokens) - 1

    def bound(self, handle: int) -> float:
        token = self._tokens[handle]
        known = self._known.get(token)
        return self._drafter.most(token) if known is None else max(known.chances, default=0.0)

    def guesses(self, handle: int) -> Guesses:
        token = self._tokens[handle]
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._drafter.guesses(token)
        return known
