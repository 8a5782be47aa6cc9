"""Rows of successors that were counted for one model beforehand, as a checkpoint of a few hundred
kilobytes: what `specdec train trigram` writes and `Trigram` begins with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.checkpoint import load_checkpoint, save_checkpoint
from specdec.drafters.pair_store import NO_TOKEN
from specdec.errors import StateError

_KIND = "trigram"
_STEPS = 16  # of a share's logarithm; one byte then reaches down to exp(-16)
_LAST = 255


class TrainedTable(NamedTuple):
    """Rows of a pair store, and how far guesses from them can be believed.

    Attributes:
        firsts: ``[n]`` int32; `NO_TOKEN` in rows of one token.
        seconds: ``[n]`` int32.
        ids: ``[n, k]`` int32 successors, best first.
        log_shares: ``[n, k]`` float16 log of each one's share among those that `Trigram` keeps.
        hits: ``[sources, ranks, buckets]`` float64 of `Calibration`, by where a guess comes from.
        trials: as `hits`.
    """

    firsts: np.ndarray
    seconds: np.ndarray
    ids: np.ndarray
    log_shares: np.ndarray
    hits: np.ndarray
    trials: np.ndarray


def save_table(
    folder: str | os.PathLike[str], target: Any, table: TrainedTable, config: Mapping[str, Any]
) -> None:
    """Writes a table: ids of 16 bits where they suffice, logarithms of shares in sixteenths.

    Args:
        folder: made if it is not there.
        target: the model whose text was counted.
        table: what to write.
        config: its recipe, as JSON holds it.
    """
    alone = table.firsts == NO_TOKEN
    wide = max(int(table.ids.max(initial=0)), int(table.seconds.max(initial=0))) >= 1 << 16
    narrow = np.int32 if wide else np.uint16
    shares = np.minimum(np.rint(-_STEPS * table.log_shares.astype(np.float32)), _LAST)
    pairs = np.stack([table.firsts, table.seconds], axis=1)[~alone]
    arrays = {
        "pairs": pairs.astype(narrow),
        "singles": table.seconds[alone].astype(narrow),
        # of the pairs, then of the singles
        "ids": np.concatenate([table.ids[~alone], table.ids[alone]]).astype(narrow),
        "shares": np.concatenate([shares[~alone], shares[alone]]).astype(np.uint8),
        "hits": table.hits.astype(np.float32),
        "trials": table.trials.astype(np.float32),
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    save_checkpoint(folder, _KIND, target, tensors, config)


def load_table(folder: str | os.PathLike[str], target: Any, vocab_size: int) -> TrainedTable:
    """Returns what `save_table` wrote.

    Args:
        folder: where it is.
        target: the model it is to draft for.
        vocab_size: of the target.

    Raises:
        StateError: if it is damaged, or of another model.
    """
    tensors, _ = load_checkpoint(folder, _KIND, target)
    pairs, singles = _ids(folder, tensors, "pairs", 2), _ids(folder, tensors, "singles", 1)
    ids, shares = _ids(folder, tensors, "ids", 2), tensors.get("shares")
    firsts = np.concatenate([pairs[:, 0], np.full(len(singles), NO_TOKEN, dtype=np.int32)])
    seconds = np.concatenate([pairs[:, 1], singles])
    hits, trials = tensors.get("hits"), tensors.get("trials")
    if (
        shares is None
        or shares.dtype != torch.uint8
        or shares.shape != ids.shape
        or len(ids) != len(seconds)
        or hits is None
        or trials is None
    ):
        raise StateError(f"{folder}: the tables of rows, shares and counts do not fit together")
    highest = max((int(table.max(initial=0)) for table in (pairs, singles, ids)), default=0)
    lowest = min((int(table.min(initial=0)) for table in (pairs, singles, ids)), default=0)
    if highest >= vocab_size or lowest < 0:
        raise StateError(f"{folder} holds ids that are not in the vocabulary of {vocab_size}")
    log_shares = (-shares.float() / _STEPS).half().numpy()
    return TrainedTable(
        firsts, seconds, ids, log_shares, hits.double().numpy(), trials.double().numpy()
    )


def _ids(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], name: str, dims: int
) -> np.ndarray:
    table = tensors.get(name)
    fits = table is not None and table.dtype in (torch.uint16, torch.int32)
    if (
        table is None
        or not fits
        or table.dim() != dims
        or (name == "pairs" and table.shape[1] != 2)
    ):
        raise StateError(f"{folder}: table {name!r} is missing or of another form")
    return table.numpy().astype(np.int32)
