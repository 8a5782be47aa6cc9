"""The rows behind two tokens: of the pair, and of the last token alone; and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from specdec.drafters.calibration import Calibration
from specdec.drafters.listed_law import NOTHING, ListedLaw, at_most_certain
from specdec.drafters.native_drafter import NativeSource
from specdec.drafters.native_table import NativeTable
from specdec.drafters.pair_store import NO_TOKEN, PairStore
from specdec.drafters.scored_nodes import ScoredNodes
from specdec.drafters.slots import StoredRow, log_shares_of
from specdec.kernels import drafting
from specdec.trees.native_law import NativeLaw
from specdec.types import Guesses

# where a guess comes from: the pair's row, the last token's where the pair is unknown, and what
# the last token's row names besides the pair's
SOURCES = ("pair", "single", "rest")
_PAIR, _SINGLE, _REST = range(3)
SourcedRow = tuple[int, StoredRow]  # with the place of its source


class PairTable:
    """A store of pairs whose guesses are as likely as they have turned out to be.

    Args:
        store: of pairs, and of single tokens under `NO_TOKEN`.
        calibrations: one for each of the three places a guess comes from; None for new ones.
    """

    def __init__(self, store: PairStore, calibrations: Sequence[Calibration] | None = None) -> None:
        k = store.num_successors
        self.store = store
        self.calibrations = calibrations or [Calibration(k) for _ in SOURCES]
        self._native: NativeTable | None = None
        if drafting.serves():
            own = store.tables
            self._native = NativeTable(
                own.ids, own.log_shares, self.calibrations, own.keys, own.ages
            )

    def law(self, before: int, root: int) -> PairLaw | NativeLaw:
        """Returns the law that follows the table from a root.

        Args:
            before: the token before the root, or `NO_TOKEN`.
            root: the last token.
        """
        if self._native is not None:
            return self._native.law(before, root)
        return PairLaw(self, before, root)

    def native(self) -> NativeSource | None:
        """Returns the table as C code asks it in several steps; None where it is Python's."""
        if self._native is None:
            return None
        return self._native.source(self.store.last_write, self._wrote)

    def _wrote(self, write: int) -> None:
        self.store.last_write = write

    def learn(self, scored: ScoredNodes, firsts: Sequence[int]) -> None:
        """Counts which guesses were right, then stores every node's row.

        Args:
            scored: the nodes.
            firsts: the token before each of them.
        """
        if self._native is not None:
            self._native.learn(scored, firsts, self.store.next_write())
            return
        for node, emitted in zip(scored.visited, scored.emitted, strict=True):
            self.count(firsts[node], scored.tokens[node], emitted)
        self.write(firsts, scored.tokens, scored.ids, scored.logits, scored.order)

    def rows(self, first: int, second: int) -> list[SourcedRow]:
        """Returns what is stored behind two tokens, each row with the place of its source."""
        single = self.store.row(NO_TOKEN, second)
        # without a first token the pair is the single token itself, and counted as such
        pair = None if first == NO_TOKEN else self.store.row(first, second)
        if pair is None:
            return [] if single is None else [(_SINGLE, single)]
        return [(_PAIR, pair)] if single is None else [(_PAIR, pair), (_REST, single)]

    def guesses_of(self, rows: Sequence[SourcedRow]) -> Guesses:
        """Returns the guesses that `rows` of a pair come to."""
        if not rows:
            return NOTHING
        source, (tokens, share_bits) = rows[0]
        chances = self.calibrations[source].chances(share_bits)
        if len(rows) == 1:
            return Guesses(tokens, at_most_certain(chances))
        source, (others, share_bits) = rows[1]
        of_token = dict(zip(tokens, chances, strict=True))
        of_others = self.calibrations[source].chances(share_bits)
        for token, chance in zip(others, of_others, strict=True):
            if token not in of_token:
                of_token[token] = chance
        ranked = sorted(of_token, key=of_token.__getitem__, reverse=True)
        return Guesses(ranked, at_most_certain(list(map(of_token.__getitem__, ranked))))

    def most(self, rows: Sequence[SourcedRow]) -> float:
        """Returns what no chance of `guesses_of` exceeds."""
        return max([self.calibrations[source].most(bits) for source, (_, bits) in rows], default=0)

    def count(self, first: int, second: int, emitted: int) -> None:
        """Counts the guesses behind two tokens, now that the next one is known."""
        named: set[int] = set()
        for source, (ids, share_bits) in self.rows(first, second):
            calibration = self.calibrations[source]
            for rank, (token, bits) in enumerate(zip(ids, share_bits, strict=True)):
                if token not in named:
                    calibration.record(rank, bits, token == emitted)
            named.update(ids)

    def write(
        self,
        firsts: Sequence[int],
        seconds: Sequence[int],
        ids: Tensor,
        logits: Tensor,
        order: Sequence[int] | None = None,
    ) -> None:
        """Stores what the target thought behind pairs, under the second tokens alone, too.

        Args:
            firsts: n tokens, or `NO_TOKEN`.
            seconds: n tokens.
            ids: ``[n, k]`` int64 on the CPU, the likeliest tokens.
            logits: ``[n, k]`` on the CPU, theirs.
            order: in which rows come; of one pair the last one stays.
        """
        successors = ids.numpy().astype(np.int32)
        self.store.write(firsts, seconds, successors, log_shares_of(logits), order, alone=True)


class PairLaw(ListedLaw):
    """A handle stands for its token and the one before it."""

    def __init__(self, table: PairTable, before: int, root: int) -> None:
        self._table = table
        self._pairs = [(before, root)]
        # many branches come by the same pair
        self._rows: dict[tuple[int, int], list[SourcedRow]] = {}
        self._known: dict[tuple[int, int], Guesses] = {}

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle for `parent` followed by `token`."""
        self._pairs.append((self._pairs[parent][1], token))
        return len(self._pairs) - 1

    def bound(self, handle: int) -> float:
        """Returns what no chance among a handle's guesses exceeds."""
        return self._table.most(self._stored(self._pairs[handle]))

    def guesses(self, handle: int) -> Guesses:
        """Returns what may follow a handle."""
        pair = self._pairs[handle]
        known = self._known.get(pair)
        if known is None:
            known = self._known[pair] = self._table.guesses_of(self._stored(pair))
        return known

    def _stored(self, pair: tuple[int, int]) -> list[SourcedRow]:
        rows = self._rows.get(pair)
        if rows is None:
            rows = self._rows[pair] = self._table.rows(*pair)
        return rows
