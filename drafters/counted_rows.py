"""Rows of successors counted in a text that is known beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from specdec.drafters.pair_store import NO_TOKEN

_ROWS_AT_ONCE = 1 << 14


def triples_of(texts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns every token of texts after the two before it, and after the one before it alone.

    Args:
        texts: int64 ids of each; no triple reaches over the end of one.

    Returns:
        ``[n, 3]`` int64; the first is `NO_TOKEN` where one token stands alone.
    """
    windows = [
        np.lib.stride_tricks.sliding_window_view(np.append(NO_TOKEN, ids), 3)
        for ids in texts
        if len(ids) > 1
    ]
    alone = np.concatenate([np.empty((0, 3), dtype=np.int64), *windows])
    pairs = alone[alone[:, 0] != NO_TOKEN]
    alone[:, 0] = NO_TOKEN
    return np.concatenate([pairs, alone])


def counted_rows(
    triples: np.ndarray, num_successors: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields what followed each pair of tokens, the rarest pairs first.

    A share is count / (total + 1): what was seen once is not certain.

    Args:
        triples: ``[n, 3]`` int64: two tokens and the one that followed them; the first may be
            `NO_TOKEN`.
        num_successors: k, the most successors of a pair; the most frequent, of equal ones the
            lowest id.

    Yields:
        firsts ``[m]``, seconds ``[m]``, ids ``[m, k]`` int32 and log-shares ``[m, k]`` float16
        (padding -1 and -inf), of a few thousand pairs.
    """
    # one integer for each pair, then one for each triple: sorting those is fast
    pairs, group = np.unique((triples[:, 0] + 1) << 32 | triples[:, 1], return_inverse=True)
    combined, counts = np.unique(group << 31 | triples[:, 2], return_counts=True)
    group, thirds = combined >> 31, combined & 0x7FFFFFFF
    totals = np.bincount(group, weights=counts, minlength=len(pairs))
    order = np.lexsort((thirds, -counts, group))
    starts = np.searchsorted(group, np.arange(len(pairs)))  # the groups are sorted already
    rank = np.arange(len(group)) - starts[group]
    kept = rank < num_successors
    source, rank, row = order[kept], rank[kept], group[kept]
    ids = np.full((len(pairs), num_successors), -1, dtype=np.int32)
    ids[row, rank] = thirds[source]
    log_shares = np.full((len(pairs), num_successors), -np.inf, dtype=np.float16)
    log_shares[row, rank] = np.log(counts[source] / (totals[row] + 1.0))
    by_total = np.argsort(totals, kind="stable")
    for first in range(0, len(pairs), _ROWS_AT_ONCE):
        chosen = by_total[first : first + _ROWS_AT_ONCE]
        firsts, seconds = (pairs[chosen] >> 32) - 1, pairs[chosen] & 0xFFFFFFFF
        yield firsts, seconds, ids[chosen], log_shares[chosen]
