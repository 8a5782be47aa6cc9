"""Trigram: what the target thought after two tokens, kept for the next time they stand so."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from specdec.drafters.calibration import Calibration
from specdec.drafters.checkpoint import find_shipped
from specdec.drafters.counted_rows import counted_rows, triples_of
from specdec.drafters.learning import LearnedState, LearningDrafter
from specdec.drafters.listed_law import NOTHING, ListedLaw, at_most_certain
from specdec.drafters.native_table import NativeTable
from specdec.drafters.pair_store import NO_TOKEN, PairStore
from specdec.drafters.scored_nodes import ScoredNodes
from specdec.drafters.slots import StoredRow, log_shares_of
from specdec.drafters.trained_table import TrainedTable, load_table
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

# where a guess comes from: the pair's row, the last token's where the pair is unknown, and what
# the last token's row names besides the pair's
_SOURCES = ("pair", "single", "rest")
_PAIR, _SINGLE, _REST = range(3)
_NO_MODEL = object()
SourcedRow = tuple[int, StoredRow]  # with the place of its source


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
        self._store = PairStore(num_pairs, num_successors)
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
        self._calibrate([Calibration(num_successors) for _ in _SOURCES])

    def _calibrate(self, calibrations: Sequence[Calibration]) -> None:
        """Believes guesses as far as these say, and lays the store out for C code anew."""
        self._calibrations = calibrations
        self._native: NativeTable | None = None
        if drafting.serves():
            own = self._store.tables
            self._native = NativeTable(own.ids, own.log_shares, calibrations, own.keys, own.ages)

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
            self._store.write(*rows)

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
        other = self._vocab_size not in (0, target.vocab_size) and len(self._store) > 0
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
        if width > self._k or len(state) != len(_SOURCES):
            raise StateError(
                f"the table has {width} successors a row, this drafter keeps {self._k}"
            )
        calibrations = [Calibration.restored(own, self._k) for own in state]
        ids = np.full((count, self._k), -1, dtype=np.int32)
        log_shares = np.full(ids.shape, -np.inf, dtype=np.float16)
        ids[:, :width], log_shares[:, :width] = table.ids, table.log_shares
        self._store.write(table.firsts, table.seconds, ids, log_shares)
        self._calibrate(calibrations)

    def judge(self, tokens: Sequence[int]) -> None:
        """Counts, along a text, which guesses of the store are right; stores nothing."""
        for first, second, following in zip(tokens, tokens[1:], tokens[2:], strict=False):
            self._count(first, second, following)

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns hits and trials ``[sources, ranks, buckets]`` of the guesses so far."""
        states = [calibration.state().arrays for calibration in self._calibrations]
        return (
            np.stack([state["hits"] for state in states]),
            np.stack([state["trials"] for state in states]),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the store when it is full."""
        return self._store.nbytes

    def start(self, row: int, prompt: Sequence[int], prompt_rows: PromptRows | None) -> None:
        """Writes the prompt's rows."""
        self._before[row] = prompt[-1] if prompt else NO_TOKEN  # the root is the token after it
        if prompt_rows is not None and len(prompt_rows.ids):
            count = len(prompt_rows.ids)
            tokens = [NO_TOKEN, *prompt[-count - 1 :]][-count - 1 :]
            self._write(tokens[:-1], tokens[1:], prompt_rows.ids, prompt_rows.logits)

    def law(self, context: DraftContext) -> DraftLaw:
        """Returns the law that follows the store from the root."""
        before = context.tokens[-2] if len(context.tokens) > 1 else NO_TOKEN
        self._before[context.row] = before
        if self._native is not None:
            return self._native.law(before, context.tokens[-1])
        return _PairLaw(self, before, context.tokens[-1])

    def guesses(self, first: int, second: int) -> Guesses:
        """Returns the guesses behind two tokens, with the estimated chance of each.

        Args:
            first: `NO_TOKEN` where there is none.
            second: the last token.
        """
        return self.guesses_of(self.rows(first, second))

    def guesses_of(self, rows: Sequence[SourcedRow]) -> Guesses:
        """Returns the guesses that `rows` of a pair come to."""
        if not rows:
            return NOTHING
        source, (tokens, share_bits) = rows[0]
        chances = self._calibrations[source].chances(share_bits)
        if len(rows) == 1:
            return Guesses(tokens, at_most_certain(chances))
        source, (others, share_bits) = rows[1]
        of_token = dict(zip(tokens, chances, strict=True))
        of_others = self._calibrations[source].chances(share_bits)
        for token, chance in zip(others, of_others, strict=True):
            if token not in of_token:
                of_token[token] = chance
        ranked = sorted(of_token, key=of_token.__getitem__, reverse=True)
        return Guesses(ranked, at_most_certain(list(map(of_token.__getitem__, ranked))))

    def most(self, rows: Sequence[SourcedRow]) -> float:
        """Returns what no chance of `guesses_of` exceeds."""
        return max([self._calibrations[source].most(bits) for source, (_, bits) in rows], default=0)

    def observe(self, outcomes: Sequence[StepOutcome]) -> None:
        """Counts which guesses were right, then stores every node's logits."""
        scored = ScoredNodes.of(outcomes, self._k)
        before = [
            self._before.get(own.row, NO_TOKEN) if own.before is None else own.before
            for own in outcomes
        ]
        firsts, seconds = scored.tokens_above(before), scored.tokens
        if self._native is not None:
            self._native.learn(scored, firsts, self._store.next_write())
        else:
            for node, emitted in zip(scored.visited, scored.emitted, strict=True):
                self._count(firsts[node], seconds[node], emitted)
            self._write(firsts, seconds, scored.ids, scored.logits, scored.order)
        for outcome in outcomes:
            self._before[outcome.row] = [outcome.tree.token_list[0], *outcome.emitted][-2]

    def stop(self, row: int) -> None:
        """Forgets which token stood before the row's root."""
        self._before.pop(row, None)

    def reset(self) -> None:
        """Forgets the store and the calibrations, what a corpus gave included; weights stay."""
        self._store.clear()
        self._num_seen = 0
        self._calibrate([Calibration(self._k) for _ in _SOURCES])
        if self._trained is not None:
            self.take(self._trained)

    def state(self) -> LearnedState:
        """Returns the store and the calibrations."""
        facts = LearnedState({}, {"vocab_size": self._vocab_size, "num_seen": self._num_seen})
        counted = {
            name: calibration.state()
            for name, calibration in zip(_SOURCES, self._calibrations, strict=True)
        }
        return LearnedState.joined({"store": self._store.state(), "of": facts, **counted})

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
        store = PairStore.restored(state.part("store"), self._store.num_pairs, self._k, bound)
        calibrations = [Calibration.restored(state.part(name), self._k) for name in _SOURCES]
        self._store, self._num_seen = store, num_seen
        self._vocab_size = self._vocab_size or vocab_size
        self._calibrate(calibrations)

    def rows(self, first: int, second: int) -> list[SourcedRow]:
        """Returns what is stored behind two tokens, each row with its place in `_SOURCES`."""
        single = self._store.row(NO_TOKEN, second)
        # without a first token the pair is the single token itself, and counted as such
        pair = None if first == NO_TOKEN else self._store.row(first, second)
        if pair is None:
            return [] if single is None else [(_SINGLE, single)]
        return [(_PAIR, pair)] if single is None else [(_PAIR, pair), (_REST, single)]

    def _count(self, first: int, second: int, emitted: int) -> None:
        """Counts the guesses behind two tokens, now that the next one is known."""
        named: set[int] = set()
        for source, (ids, share_bits) in self.rows(first, second):
            calibration = self._calibrations[source]
            for rank, (token, bits) in enumerate(zip(ids, share_bits, strict=True)):
                if token not in named:
                    calibration.record(rank, bits, token == emitted)
            named.update(ids)

    def _write(
        self,
        firsts: Sequence[int],
        seconds: Sequence[int],
        ids: Tensor,
        logits: Tensor,
        order: Sequence[int] | None = None,
    ) -> None:
        successors = ids.numpy().astype(np.int32)
        self._store.write(firsts, seconds, successors, log_shares_of(logits), order, alone=True)


class _PairLaw(ListedLaw):
    """A handle stands for its token and the one before it."""

    def __init__(self, drafter: Trigram, before: int, root: int) -> None:
        self._drafter = drafter
        self._pairs = [(before, root)]
        # many branches come by the same pair
        self._rows: dict[tuple[int, int], list[SourcedRow]] = {}
        self._known: dict[tuple[int, int], Guesses] = {}

    def extend(self, parent: int, token: int) -> int:
        self._pairs.append((self._pairs[parent][1], token))
        return len(self._pairs) - 1

    def bound(self, handle: int) -> float:
        return self._drafter.most(self._stored(self._pairs[handle]))

    def guesses(self, handle: int) -> Guesses:
        pair = self._pairs[handle]
        known = self._known.get(pair)
        if known is None:
            known = self._known[pair] = self._drafter.guesses_of(self._stored(pair))
        return known

    def _stored(self, pair: tuple[int, int]) -> list[SourcedRow]:
        rows = self._rows.get(pair)
        if rows is None:
            rows = self._rows[pair] = self._drafter.rows(*pair)
        return rows
