"""A bounded table from pairs of tokens to their best successors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from struct import Struct
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from specdec.drafters.learning import LearnedState
from specdec.drafters.slots import Slots, StoredRow
from specdec.errors import ConfigError, StateError

_WAYS = 8  # slots a pair may stand in: its keys are one cache line
_MIX = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: neighbours fall far apart
_MULTIPLIER = np.uint64(_MIX)
_SET = Struct(f"{_WAYS}q")
_HALF = np.uint64(32)
_WORD = 2**64 - 1
_FEW = 128  # pairs that are written one by one
NO_TOKEN = -1


class StoredRows(NamedTuple):
    """What is stored under n pairs.

    Attributes:
        ids: ``[n, k]`` int32 successors, best first; -1 is padding.
        log_shares: ``[n, k]`` float16 log of each one's share; -inf beside padding.
        found: ``[n]`` bool, whether the pair is stored; the rows of the others are padding.
    """

    ids: np.ndarray
    log_shares: np.ndarray
    found: np.ndarray


class StoreTables(NamedTuple):
    """What a store of S sets of eight slots is made of.

    Attributes:
        keys: ``[S, 8]`` int64 of the pairs, 0: free.
        ages: ``[S, 8]`` uint32 number of the write.
        ids: ``[S, 8, k]`` int32 successors.
        log_shares: ``[S, 8, k]`` float16.
    """

    keys: np.ndarray
    ages: np.ndarray
    ids: np.ndarray
    log_shares: np.ndarray


class PairStore:
    """Successors by pair of tokens, in a set-associative hash table of a fixed size.

    A pair may stand in any of the eight slots of its set; its 64-bit key is kept there and
    compared, so that two pairs never take each other's rows. When a set is full, the pair that was
    written longest ago gives way. Writing many pairs costs a few numpy calls whatever their number;
    few are written, and all are read, pair by pair. A slot takes 12 + 6 k bytes, touched when first
    written.

    The first of a pair may be `NO_TOKEN`: a row for the second token alone.

    Args:
        num_pairs: slots, rounded down to a multiple of eight.
        num_successors: k, the entries of a row.

    Raises:
        ConfigError: if there are less than eight slots or no successors.
    """

    def __init__(self, num_pairs: int, num_successors: int) -> None:
        if num_pairs < _WAYS or num_successors < 1:
            raise ConfigError(
                f"a pair store needs num_pairs of at least {_WAYS} and num_successors of at least "
                f"1, got {num_pairs} and {num_successors}"
            )
        self._k = num_successors
        shape = (num_pairs // _WAYS, _WAYS)
        self._keys = np.zeros(shape, dtype=np.int64)  # 0: free
        self._ages = np.zeros(shape, dtype=np.uint32)  # number of the write
        self._ids = np.zeros((*shape, num_successors), dtype=np.int32)
        self._log_shares = np.zeros((*shape, num_successors), dtype=np.float16)
        self._writes = 0
        self._num_sets = len(self._keys)
        self._key_bytes = self._keys.reshape(-1).view(np.uint8).data
        self._key_at, self._age_at = self._keys.reshape(-1).data, self._ages.reshape(-1).data
        self._slots = Slots(self._ids, self._log_shares)

    def __len__(self) -> int:
        """Pairs stored."""
        return int(np.count_nonzero(self._keys))

    @property
    def num_successors(self) -> int:
        """Entries of a row."""
        return self._k

    @property
    def num_pairs(self) -> int:
        """Slots."""
        return self._keys.size

    @property
    def nbytes(self) -> int:
        """Bytes of the table when it is full."""
        tables = (self._keys, self._ages, self._ids, self._log_shares)
        return sum(table.nbytes for table in tables)

    @property
    def tables(self) -> StoreTables:
        """The arrays themselves, for C code that looks up and writes as this class does."""
        return StoreTables(self._keys, self._ages, self._ids, self._log_shares)

    def next_write(self) -> int:
        """Returns the age of what is written now; others may write to `tables` with it."""
        self._writes += 1
        return self._writes

    @property
    def last_write(self) -> int:
        """The age of what was written last; others who write to `tables` move it on."""
        return self._writes

    @last_write.setter
    def last_write(self, write: int) -> None:
        self._writes = write

    def find(self, firsts: ArrayLike, seconds: ArrayLike) -> StoredRows:
        """Returns what is stored under pairs; the reference of `row`.

        Args:
            firsts: ``[n]`` token ids, or `NO_TOKEN`.
            seconds: ``[n]`` token ids.
        """
        keys = _keys_of(firsts, seconds)
        places = self._places(keys)
        match = self._keys[places] == keys[:, None]
        ways = match.argmax(axis=1)
        found = match[np.arange(len(keys)), ways]
        ids, log_shares = self._ids[places, ways], self._log_shares[places, ways]
        ids[~found] = -1
        log_shares[~found] = -np.inf
        return StoredRows(ids, log_shares, found)

    def row(self, first: int, second: int) -> StoredRow | None:
        """Returns the successors under one pair and the bits of their log-shares; None if unknown.

        What `find` does for one pair, without numpy's calls.
        """
        key = (first + 1) << 32 | (second + 1)
        start, keys = self._set_of(key)
        return self._slots.row(start + keys.index(key)) if key in keys else None

    def write(
        self,
        firsts: Sequence[int] | np.ndarray,
        seconds: Sequence[int] | np.ndarray,
        ids: np.ndarray,
        log_shares: np.ndarray,
        order: Sequence[int] | None = None,
        *,
        alone: bool = False,
    ) -> None:
        """Stores rows; of one pair the last row stays, and an older one is replaced.

        Args:
            firsts: ``[n]`` token ids, or `NO_TOKEN`.
            seconds: ``[n]`` token ids.
            ids: ``[n, k]`` successors, best first; padding is -1.
            log_shares: ``[n, k]`` log of each one's share, -inf beside padding.
            order: in which rows come, every one of them; as they stand for None.
            alone: whether to store each under its second token alone, too.
        """
        if not len(seconds):
            return
        ids = np.ascontiguousarray(ids, np.int32)
        log_shares = np.ascontiguousarray(log_shares, np.float16)
        rows = _by_key(_listed(firsts), _listed(seconds), order, alone=alone)
        if len(rows) <= _FEW:
            self._slots.put(self._slots_for(rows), ids, log_shares)
        else:
            chosen = list(rows.values())
            self._write_all(np.array(list(rows)), ids[chosen], log_shares[chosen])

    def _slots_for(self, rows: Mapping[int, int]) -> list[tuple[int, int]]:
        """Makes room for keys one by one: a third of the time of `_write_all` for a small tree.

        Args:
            rows: what is to be written, by key.

        Returns:
            Pairs of a slot and the row that goes there.
        """
        age_at = self._age_at
        write = self.next_write()
        slots, new = [], []
        for key, row in rows.items():
            start, keys = self._set_of(key)
            if key in keys:
                slot = start + keys.index(key)
                age_at[slot] = write
                slots.append((slot, row))
            else:
                new.append((start, key, row))
        for start, key, row in new:  # when all that are rewritten are the youngest
            ages = age_at[start : start + _WAYS].tolist()
            slot = start + ages.index(min(ages))
            self._key_at[slot] = key
            age_at[slot] = write
            slots.append((slot, row))
        return slots

    def _write_all(self, keys: np.ndarray, ids: np.ndarray, log_shares: np.ndarray) -> None:
        """Stores rows under different keys, by a few numpy calls for all."""
        places = self._places(keys)
        match = self._keys[places] == keys[:, None]
        ways = match.argmax(axis=1)
        found = match[np.arange(len(keys)), ways]
        write = self.next_write()
        self._ages[places[found], ways[found]] = write
        if not found.all():
            ways[~found] = self._free_ways(places[~found])
        self._keys[places, ways] = keys
        self._ages[places, ways] = write
        self._ids[places, ways] = ids
        self._log_shares[places, ways] = log_shares

    def clear(self) -> None:
        """Forgets every pair."""
        self._keys.fill(0)
        self._ages.fill(0)
        self._writes = 0

    def state(self) -> LearnedState:
        """Returns the pairs that are stored, oldest first."""
        places, ways = np.nonzero(self._keys)
        order = np.argsort(self._ages[places, ways], kind="stable")
        places, ways = places[order], ways[order]
        keys = self._keys[places, ways]
        pairs = np.stack([(keys >> 32) - 1, (keys & 0xFFFFFFFF) - 1], axis=1)
        return LearnedState(
            {
                "pairs": pairs.astype(np.int32),
                "ages": self._ages[places, ways],
                "successors": self._ids[places, ways],
                "log_shares": self._log_shares[places, ways],
            }
        )

    @staticmethod
    def restored(
        state: LearnedState, num_pairs: int, num_successors: int, vocab_size: int
    ) -> PairStore:
        """Returns the store of a state; of more pairs than fit the youngest are kept.

        Args:
            state: what `state` returned.
            num_pairs: as in `PairStore`; it may differ from that of the store that was saved.
            num_successors: as in `PairStore`.
            vocab_size: ids must be below it.

        Raises:
            StateError: if the state does not fit.
        """
        pairs = state.array("pairs", (-1, 2), np.int32)
        count = len(pairs)
        ages = state.array("ages", (count,), np.uint32)
        ids = state.array("successors", (count, num_successors), np.int32)
        log_shares = state.array("log_shares", (count, num_successors), np.float16)
        for name, table in (("pairs", pairs), ("successors", ids)):
            if count and (table.max() >= vocab_size or table.min() < -1):
                raise StateError(
                    f"table {name!r} holds ids that are not in its vocabulary of {vocab_size}"
                )
        keys = _keys_of(pairs[:, 0], pairs[:, 1])
        if (pairs[:, 1] < 0).any() or len(np.unique(keys)) != count:
            raise StateError("table 'pairs' holds a pair twice, or one without a second token")
        store = PairStore(num_pairs, num_successors)
        youngest_first = np.argsort(ages, kind="stable")[::-1]
        places = store._places(keys[youngest_first])
        # equal ages stay in the order of their slots, which is that in which they give way
        ways = _WAYS - 1 - _ranks_within(places)
        kept = ways >= 0
        source, slots = youngest_first[kept], (places[kept], ways[kept])
        store._keys[slots] = keys[source]
        store._ages[slots] = ages[source]
        store._ids[slots] = ids[source]
        store._log_shares[slots] = log_shares[source]
        store._writes = int(ages.max(initial=0))
        return store

    def _set_of(self, key: int) -> tuple[int, tuple[int, ...]]:
        """Returns the first slot of a key's set, and the keys in it."""
        place = ((key * _MIX & _WORD) >> 32) * self._num_sets >> 32
        return place * _WAYS, _SET.unpack_from(self._key_bytes, place * _SET.size)

    def _places(self, keys: np.ndarray) -> np.ndarray:
        """Returns the set of each key."""
        mixed = (keys.view(np.uint64) * _MULTIPLIER) >> _HALF
        return ((mixed * np.uint64(len(self._keys))) >> _HALF).astype(np.int64)

    def _free_ways(self, places: np.ndarray) -> np.ndarray:
        """Returns where in their sets new pairs go: free slots first, then the oldest."""
        by_age = np.argsort(self._ages[places], axis=1, kind="stable")
        # several new pairs of one set take different slots
        ways: np.ndarray = by_age[np.arange(len(places)), _ranks_within(places) % _WAYS]
        return ways


def _by_key(
    firsts: Sequence[int], seconds: Sequence[int], order: Sequence[int] | None, *, alone: bool
) -> dict[int, int]:
    """Returns the row of each key, of equal keys the last; see `PairStore.write`."""
    numbers = range(len(seconds)) if order is None else order
    # a dict takes a third of the time of numpy's sorting
    rows = {(firsts[row] + 1) << 32 | (seconds[row] + 1): row for row in numbers}
    if alone:
        rows |= {seconds[row] + 1: row for row in numbers}
    return rows


def _listed(ids: Sequence[int] | np.ndarray) -> Sequence[int]:
    listed: Sequence[int] = ids.tolist() if isinstance(ids, np.ndarray) else ids
    return listed


def _keys_of(firsts: ArrayLike, seconds: ArrayLike) -> np.ndarray:
    """Returns one positive int64 for each pair."""
    first, second = np.asarray(firsts, dtype=np.int64), np.asarray(seconds, dtype=np.int64)
    keys: np.ndarray = ((first + 1) << 32) | (second + 1)
    return keys


def _ranks_within(groups: np.ndarray) -> np.ndarray:
    """Returns how many earlier entries are of the same group."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
    lengths = np.diff(np.append(starts, len(ordered)))
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - np.repeat(starts, lengths)
    return ranks
