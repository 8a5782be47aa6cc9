"""Trigram: what the target thought after two tokens, kept for the next time they stand so."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specdec.drafters.calibration import Calibration
from specdec.drafters.checkpoint import find_shipped
from specdec.drafters.counted_rows import counted_rows, triples_of
from specdec.drafters.learning import LearnedState, LearningDrafter
from specdec.drafters.native_drafter import NativeDrafter
from specdec.drafters.pair_store import NO_TOKEN, PairStore
from specdec.drafters.pair_table import SOURCES, PairTable
from specdec.drafters.scored_nodes import ScoredNodes
from specdec.drafters.trained_table import TrainedTable, load_table
from specdec.errors import ConfigError, StateError
from specdec.types import (
    DraftContext,
    DrafterNeeds,
    DraftLaw,
    Guesses,
    PromptRows,
    StepOutcome,
    TargetInfo,
)

_NO_MODEL = object()


class Trigram(LearningDrafter):
    """Remembers, for each pair of tokens, the target's k best successors when it last stood there.

    Every node of every tree writes its row under (its parent's token, its own), accepted or not,
    and so does every prompt position; a later row replaces an earlier one. Each row is written
    under the last token alone too. A node's guesses are those of its pair, then those of its last
    token that the pair's row does not name; where the pair was never seen, the last token's. The
    chance of each is counted by source, rank and share, so that trees can be grown best first.

    Source: the tri-gram store of Adaptive Draft-Verification (ADED, arXiv 2407.12021). Where we
    differ: it counts a corpus and raises by a constant what the text repeats, over a store that
    only grows; here the target's own distributions are the store, rejected branches included, as
    in token recycling (arXiv 2408.08696), no corpus is needed, memory is fixed and the pairs
    written longest ago give way. A corpus may be counted beforehand (`learn`, `from_corpus`).

    Rows of a batch, and calls, share the store: it changes which guesses are made, never the text.

    With `weights` the store begins with the mean laws of text that the target wrote beforehand
    (``python -m specdec train trigram``), and replaces them by what it sees.

    Args:
        num_pairs: slots of the store, for pairs and single tokens together. One takes 12 + 6 k
            bytes, whatever the vocabulary: 31 MB by default.
        num_successors: k, the entries of a row.
        prompt_rows: learn from the prompt's positions too; it costs the language-model head there.
        weights: a folder that ``scripts/train_drafter.py trigram`` wrote; "shipped" for what comes
            with the toolkit, if there is such a table for the target; None to begin with nothing.

    Raises:
        ConfigError: if there are less than eight slots or no successors.
    """

    name = "trigram"
    SURVIVORS = 8  # successors of a row, unless another number is asked for

    def __init__(
        self,
        num_pairs: int = 1 << 19,
        num_successors: int = SURVIVORS,
        prompt_rows: bool = True,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        self._table = PairTable(PairStore(num_pairs, num_successors))
        self._k = num_successors
        self.needs = DrafterNeeds(
            prompt_top_k=num_successors if prompt_rows else 0,
            node_top_k=num_successors,
            every_step=False,
        )
        self._vocab_size = 0  # 0: not attached yet
        self._num_seen = 0  # one above the largest id of a corpus
        self._weights = weights
        self._trained: TrainedTable | None = None
        self._trained_for: Any = _NO_MODEL  # whose table was looked for
        self._before: dict[int, int] = {}  # the token before the root, by row

    @classmethod
    def from_corpus(
        cls, source: str | os.PathLike[str] | Iterable[str], tokenizer: Any, **options: Any
    ) -> Trigram:
        """Returns a drafter that has counted a corpus.

        Args:
            source: the path of one UTF-8 text, or the texts themselves.
            tokenizer: the target's, as transformers makes them.
            options: as in `Trigram`.
        """
        if isinstance(source, str | os.PathLike):
            source = [Path(source).read_text(encoding="utf-8")]
        texts = [tokenizer(text, add_special_tokens=False, verbose=False) for text in source]
        drafter = cls(**options)
        drafter.learn(*(text["input_ids"] for text in texts))
        return drafter

    def learn(self, *texts: Sequence[int]) -> None:
        """Counts token ids: what followed each pair and each token becomes its row.

        One call counts all its texts together, and replaces the rows of pairs known before; each
        share is count / (total + 1), so that what was seen once is not taken for certain. Of more
        pairs than fit the most frequent stay. Working memory is about 100 bytes a token.

        Args:
            texts: the ids of each; no pair reaches over the end of one.

        Raises:
            ConfigError: if an id is negative or not in the vocabulary of the attached target.
        """
        arrays = [np.asarray(text, dtype=np.int64).reshape(-1) for text in texts]
        highest = max((int(ids.max(initial=-1)) for ids in arrays), default=-1)
        lowest = min((int(ids.min(initial=0)) for ids in arrays), default=0)
        if lowest < 0 or highest >= (self._vocab_size or np.iinfo(np.int32).max):
            raise ConfigError(
                f"token ids must be from 0 to below {self._vocab_size or 'the vocabulary size'}, "
                f"got {lowest} to {highest}; use the target's own tokenizer"
            )
        self._num_seen = max(self._num_seen, highest + 1)
        for rows in counted_rows(triples_of(arrays), self._k):
            self._table.store.write(*rows)

    def attach(self, target: TargetInfo) -> None:
        """Fits the store to a vocabulary; keeps a learned one that already fits.

        Raises:
            ConfigError: if it does not fit, or weights are wanted and the model is not known.
            StateError: if the weights are damaged, or of another target.
        """
        if self._k > target.vocab_size:
            raise ConfigError(
                f"num_successors is {self._k}, but the vocabulary has {target.vocab_size} tokens"
            )
        other = self._vocab_size not in (0, target.vocab_size) and len(self._table.store) > 0
        if other or self._num_seen > target.vocab_size:
            learned = max(self._vocab_size, self._num_seen)
            raise ConfigError(
                f"this trigram store was learned for {learned} tokens, the target has "
                f"{target.vocab_size}; make a new drafter or call reset()"
            )
        self._vocab_size = target.vocab_size
        if self._weights is not None and self._trained_for is not target.model:
            self._trained = self._table_for(target)
            self._trained_for = target.model
            if self._trained is not None:
                self.take(self._trained)

    def _table_for(self, target: TargetInfo) -> TrainedTable | None:
        folder = self._weights
        if folder == "shipped":
            folder = None if target.model is None else find_shipped(self.name, target.model)
        elif target.model is None:
            raise ConfigError(
                "the weights of a trigram drafter belong to one model: give it to a "
                "SpeculativeGenerator, which hands it the model"
            )
        return None if folder is None else load_table(folder, target.model, target.vocab_size)

    def take(self, table: TrainedTable) -> None:
        """Stores the rows of a table, and believes guesses as far as it says.

        Raises:
            StateError: if its rows or its counts are for more successors than this store keeps.
        """
        count, width = table.ids.shape
        state = [
            LearnedState({"hits": hits, "trials": trials})
            for hits, trials in zip(table.hits, table.trials, strict=True)
        ]
        if width > self._k or len(state) != len(SOURCES):
            raise StateError(
                f"the table has {width} successors a row, this drafter keeps {self._k}"
            )
        calibrations = [Calibration.restored(own, self._k) for own in state]
        ids = np.full((count, self._k), -1, dtype=np.int32)
        log_shares = np.full(ids.shape, -np.inf, dtype=np.float16)
        ids[:, :width], log_shares[:, :width] = table.ids, table.log_shares
        self._table = PairTable(self._table.store, calibrations)
        self._table.store.write(table.firsts, table.seconds, ids, log_shares)

    def judge(self, tokens: Sequence[int]) -> None:
        """Counts, along a text, which guesses of the store are right; stores nothing."""
        for first, second, following in zip(tokens, tokens[1:], tokens[2:], strict=False):
            self._table.count(first, second, following)

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns hits and trials ``[sources, ranks, buckets]`` of the guesses so far."""
        states = [calibration.state().arrays for calibration in self._table.calibrations]
        return (
            np.stack([state["hits"] for state in states]),
            np.stack([state["trials"] for state in states]),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the store when it is full."""
        return self._table.store.nbytes

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Writes the prompt's rows."""
        self._before[row] = prompt[-1] if prompt else NO_TOKEN  # the root is the token after it
        if prompt_rows is not None and len(prompt_rows.ids):
            count = len(prompt_rows.ids)
            tokens = [NO_TOKEN, *prompt[-count - 1 :]][-count - 1 :]
            self._table.write(tokens[:-1], tokens[1:], prompt_rows.ids, prompt_rows.logits)

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns the law that follows the store from the root."""
        before = context.tokens[-2] if len(context.tokens) > 1 else NO_TOKEN
        self._before[context.row] = before
        return self._table.law(before, context.tokens[-1])

    def native(self, context: DraftContext) -> NativeDrafter | None:
        """See `specdec.drafters.native_drafter.HasNative`."""
        source = self._table.native() if type(self) is Trigram else None
        return None if source is None else NativeDrafter([source])

    def guesses(self, first: int, second: int) -> Guesses:
        """Returns the guesses behind two tokens, with the estimated chance of each.

        Args:
            first: `NO_TOKEN` where there is none.
            second: the last token.
        """
        return self._table.guesses_of(self._table.rows(first, second))

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Counts which guesses were right, then stores every node's logits."""
        scored = ScoredNodes.of(outcomes, self._k)
        before = [
            self._before.get(own.row, NO_TOKEN) if own.before is None else own.before
            for own in outcomes
        ]
        self._table.learn(scored, scored.tokens_above(before))
        for outcome in outcomes:
            self._before[outcome.row] = [outcome.tree.token_list[0], *outcome.emitted][-2]

    def stop(self, row: int) -> None:
        """Forgets which token stood before the row's root."""
        self._before.pop(row, None)

    def reset(self) -> None:
        """Forgets the store and the calibrations, what a corpus gave included; weights stay."""
        self._table.store.clear()
        self._table = PairTable(self._table.store)
        self._num_seen = 0
        if self._trained is not None:
            self.take(self._trained)

    def state(self) -> LearnedState:
        """Returns the store and the calibrations."""
        facts = LearnedState({}, {"vocab_size": self._vocab_size, "num_seen": self._num_seen})
        counted = {
            name: calibration.state()
            for name, calibration in zip(SOURCES, self._table.calibrations, strict=True)
        }
        return LearnedState.joined({"store": self._table.store.state(), "of": facts, **counted})

    def restore(self, state: LearnedState) -> None:
        """Takes over a store; it must be of this k, and of the target's vocabulary if attached.

        The store may have been larger or smaller; of more pairs than fit the youngest are kept.
        """
        facts = state.part("of")
        vocab_size, num_seen = facts.fact("vocab_size", int), facts.fact("num_seen", int)
        if self._vocab_size not in (0, vocab_size) and (vocab_size or num_seen > self._vocab_size):
            raise StateError(
                f"the store was learned for {vocab_size or num_seen} tokens, the target has "
                f"{self._vocab_size}; load it into a drafter of a target with its tokenizer"
            )
        bound = vocab_size or self._vocab_size or num_seen
        num_pairs = self._table.store.num_pairs
        store = PairStore.restored(state.part("store"), num_pairs, self._k, bound)
        calibrations = [Calibration.restored(state.part(name), self._k) for name in SOURCES]
        self._table, self._num_seen = PairTable(store, calibrations), num_seen
        self._vocab_size = self._vocab_size or vocab_size
