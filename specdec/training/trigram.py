"""Rows for the trigram drafter, counted over the target's own text: no step of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from specdec.drafters.pair_store import NO_TOKEN
from specdec.drafters.trained_table import TrainedTable
from specdec.drafters.trigram import Trigram
from specdec.errors import ConfigError
from specdec.training.corpus import OwnText

_CONSIDERED = 16  # successors of a position that are added up
_TRUSTED = 200.0  # trials that count: the text that is written later has its say too


@dataclass(frozen=True, slots=True)
class TableSettings:
    """What is kept of the text.

    Attributes:
        num_successors: of a row.
        least_pair: times that a pair must have come to have a row.
        least_single: times that a token must have come to have a row.
        held_out_share: of the texts, by which the chances of the guesses are counted.
    """

    num_successors: int = 4
    least_pair: int = 3
    least_single: int = 2
    held_out_share: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.num_successors <= Trigram.SURVIVORS:
            raise ConfigError(
                f"num_successors must be 1 to {Trigram.SURVIVORS}, got {self.num_successors}"
            )
        if min(self.least_pair, self.least_single) < 1 or not 0 < self.held_out_share < 1:
            raise ConfigError(
                "least_pair and least_single must be 1 or more and held_out_share between 0 and 1; "
                f"got {self.least_pair}, {self.least_single} and {self.held_out_share}"
            )


class _Positions(NamedTuple):
    """Every position of the answers: the two tokens up to it, and the law behind it.

    Attributes:
        firsts: ``[n]`` int64; `NO_TOKEN` where the pair does not count.
        seconds: ``[n]`` int64.
        ids: ``[n, m]`` int64, the likeliest tokens.
        chances: ``[n, m]`` float64.
    """

    firsts: np.ndarray
    seconds: np.ndarray
    ids: np.ndarray
    chances: np.ndarray


class _Rows(NamedTuple):
    """As in `TrainedTable`."""

    firsts: np.ndarray
    seconds: np.ndarray
    ids: np.ndarray
    log_shares: np.ndarray


def count_table(texts: Sequence[OwnText], settings: TableSettings) -> TrainedTable:
    """Returns the mean of the target's laws behind each pair of tokens, and behind each token.

    The mean counts a guess by how likely the target found it wherever the pair stood, not by what
    happened to be written there. How far guesses can be believed is counted on texts kept out.

    Args:
        texts: without features.
        settings: what is kept.

    Raises:
        ConfigError: if there are too few texts.
    """
    held_out = round(len(texts) * settings.held_out_share)
    if not 0 < held_out < len(texts):
        raise ConfigError(f"of {len(texts)} texts, {held_out} would be kept out; raise --num-texts")
    judge = Trigram(prompt_rows=False)
    judge.take(_table(texts[held_out:], settings, judge))
    for text in texts[:held_out]:
        judge.judge(text.tokens[max(0, text.answer_start - 2) :].tolist())
    return _table(texts, settings, judge)


def _table(texts: Sequence[OwnText], settings: TableSettings, judge: Trigram) -> TrainedTable:
    parts = [_positions(text) for text in texts]
    together = _Positions(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    alone = together._replace(firsts=np.full_like(together.firsts, NO_TOKEN))
    pairs = _Positions(*(column[together.firsts != NO_TOKEN] for column in together))
    both = (
        _mean_rows(pairs, settings.least_pair, settings.num_successors),
        _mean_rows(alone, settings.least_single, settings.num_successors),
    )
    rows = _Rows(*(np.concatenate(columns) for columns in zip(*both, strict=True)))
    hits, trials = judge.counts()
    trusted = np.minimum(1.0, _TRUSTED / trials)
    return TrainedTable(*rows, hits * trusted, trials * trusted)


def _positions(text: OwnText) -> _Positions:
    ids, log_chances = text.top_ids[:, :_CONSIDERED].numpy(), text.top_log_probs[:, :_CONSIDERED]
    at = np.flatnonzero(ids[:, 0] >= 0)  # where the law was kept
    tokens = text.tokens.numpy().astype(np.int64)
    firsts = np.where(at > 0, tokens[at - 1], NO_TOKEN)
    return _Positions(firsts, tokens[at], ids[at], np.exp(log_chances.numpy()[at].astype(float)))


def _mean_rows(positions: _Positions, least: int, num_successors: int) -> _Rows:
    """Returns the mean law behind each pair that came often enough; ids of -1 fill up rows."""
    firsts, seconds, ids, chances = positions
    # one integer for each pair, then one for each successor of one: sorting those is fast
    pairs, group, counts = np.unique(
        (firsts + 1) << 32 | seconds, return_inverse=True, return_counts=True
    )
    width = ids.shape[1]
    combined, place = np.unique(np.repeat(group, width) << 31 | ids.ravel(), return_inverse=True)
    sums = np.bincount(place, weights=chances.ravel(), minlength=len(combined))
    group, successors = combined >> 31, combined & 0x7FFFFFFF
    order = np.lexsort((successors, -sums, group))
    starts = np.searchsorted(group, np.arange(len(pairs)))  # the groups are sorted already
    rank = np.arange(len(group)) - starts[group]
    kept = rank < Trigram.SURVIVORS
    row, rank, source = group[kept], rank[kept], order[kept]
    table = np.full((len(pairs), Trigram.SURVIVORS), -1, dtype=np.int32)
    means = np.zeros(table.shape)
    table[row, rank] = successors[source]
    means[row, rank] = sums[source] / counts[row]
    # a share is one among as many as a row of the target's own has
    with np.errstate(divide="ignore"):
        log_shares = np.log(means / means.sum(axis=1, keepdims=True))
    often = counts >= least
    return _Rows(
        ((pairs >> 32) - 1)[often].astype(np.int32),
        (pairs & 0xFFFFFFFF)[often].astype(np.int32),
        table[often, :num_successors],
        log_shares[often, :num_successors].astype(np.float16),
    )
