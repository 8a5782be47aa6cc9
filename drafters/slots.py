"""Reads and writes one row of a table at a time, as a tree that is grown node by node asks."""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

import numpy as np
from torch import Tensor

StoredRow = tuple[tuple[int, ...], tuple[int, ...]]  # tokens and the bits of their log-shares


def log_shares_of(logits: Tensor) -> np.ndarray:
    """Returns ``[n, k]`` float16: the log of each logit's share in its row.

    Args:
        logits: ``[n, k]`` on the CPU, the largest first.
    """
    kept = logits.float().numpy()
    kept = kept - kept[:, :1]
    # numpy's calls take less than torch's for the few rows of a tree
    shares: np.ndarray = kept - np.log(np.exp(kept).sum(axis=1, keepdims=True))
    return shares.astype(np.float16)


class Slots:
    """A view of successors and their log-shares, of a table that others may write to as well.

    Unpacking a row from memory takes a fifth of the time that indexing an array and `tolist` take.

    Args:
        ids: ``[..., k]`` int32, contiguous; -1 is padding, behind all successors of a row.
        log_shares: ``[..., k]`` float16, contiguous.
    """

    __slots__ = (
        *("_id_bytes", "_id_size", "_ids_of"),
        *("_share_bytes", "_share_size", "_shares_of"),
    )

    def __init__(self, ids: np.ndarray, log_shares: np.ndarray) -> None:
        assert ids.flags.c_contiguous  # else it would read a copy
        assert log_shares.flags.c_contiguous
        ids_of, shares_of = Struct(f"{ids.shape[-1]}i"), Struct(f"{log_shares.shape[-1]}H")
        self._id_bytes = ids.reshape(-1).view(np.uint8).data
        self._share_bytes = log_shares.reshape(-1).view(np.uint8).data
        self._id_size, self._share_size = ids_of.size, shares_of.size
        self._ids_of, self._shares_of = ids_of.unpack_from, shares_of.unpack_from

    def row(self, slot: int) -> StoredRow:
        """Returns the successors in a slot, best first, and the bits of their log-shares."""
        ids = self._ids_of(self._id_bytes, slot * self._id_size)
        share_bits = self._shares_of(self._share_bytes, slot * self._share_size)
        if ids[-1] < 0:
            count = ids.index(-1)
            return ids[:count], share_bits[:count]
        return ids, share_bits

    def put(self, rows: Iterable[tuple[int, int]], ids: np.ndarray, log_shares: np.ndarray) -> None:
        """Copies rows into slots.

        Args:
            rows: pairs of a slot and the row it gets.
            ids: ``[n, k]`` int32.
            log_shares: ``[n, k]`` float16.
        """
        id_size, share_size = self._id_size, self._share_size
        new_ids = ids.reshape(-1).view(np.uint8).data
        new_shares = log_shares.reshape(-1).view(np.uint8).data
        own_ids, own_shares = self._id_bytes, self._share_bytes
        for slot, row in rows:
            own_ids[slot * id_size : (slot + 1) * id_size] = new_ids[
                row * id_size : (row + 1) * id_size
            ]
            own_shares[slot * share_size : (slot + 1) * share_size] = new_shares[
                row * share_size : (row + 1) * share_size
            ]
