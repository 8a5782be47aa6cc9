"""Tables of successors as C code reads and writes them, in the memory where they stand."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence

import numpy as np
import torch

from specdec.drafters.calibration import BUCKETS, Calibration
from specdec.drafters.native_drafter import NativeSource
from specdec.drafters.scored_nodes import ScoredNodes
from specdec.kernels.drafting import SeenStruct, TableStruct, functions
from specdec.kernels.step_structs import TABLE
from specdec.trees.native_law import NativeLaw


class NativeTable:
    """What `PairTable` and the matrix of token recycling do, on the same arrays.

    Args:
        ids: ``[..., k]`` int32 successors; -1 is padding.
        log_shares: ``[..., k]`` float16.
        calibrations: one for each place where a row may stand: pair, single token, and single
            token beside a pair; one alone for a matrix.
        keys: ``[sets, ways]`` int64 of a store of pairs; None for a matrix, whose rows are tokens'.
        ages: ``[sets, ways]`` uint32 beside `keys`.
    """

    def __init__(
        self,
        ids: np.ndarray,
        log_shares: np.ndarray,
        calibrations: Sequence[Calibration],
        keys: np.ndarray | None = None,
        ages: np.ndarray | None = None,
    ) -> None:
        self._kept = (ids, log_shares, keys, ages, calibrations)  # what the pointers point to
        own = self._struct = TableStruct()
        own.ids, own.log_shares = ids.ctypes.data, log_shares.ctypes.data
        own.num_sets, own.k = ids.shape[0], ids.shape[-1]
        own.buckets = BUCKETS.ctypes.data
        if keys is not None and ages is not None:
            own.keys, own.ages = keys.ctypes.data, ages.ctypes.data
        for kind, calibration in enumerate(calibrations):
            own.hits[kind] = calibration.hits.buffer_info()[0]
            own.trials[kind] = calibration.trials.buffer_info()[0]
            own.chances[kind] = calibration.of_cells.buffer_info()[0]
        self._at = ctypes.addressof(own)

    def law(self, before: int, root: int) -> NativeLaw:
        """Returns the law that follows the table from a root.

        Args:
            before: the token before the root, -1 for none.
            root: the last token.
        """
        return NativeLaw(functions().table_law(self._at, before, root), self)

    def source(self, write: int, wrote: Callable[[int], None]) -> NativeSource:
        """Returns the table as C code asks it in several steps.

        Args:
            write: number of the last write.
            wrote: told that number afterwards.
        """
        return NativeSource(TABLE, self._at, write, lambda number, _: wrote(number), self)

    def learn(self, scored: ScoredNodes, firsts: Sequence[int], write: int = 0) -> None:
        """Counts which guesses were right, then stores every node's row.

        Args:
            scored: the nodes.
            firsts: the token before each of them.
            write: number of the write, the age of what is stored by it.
        """
        ids, logits = scored.ids, scored.logits
        if logits.dtype is not torch.float32:
            logits = logits.float()
        shape = (len(firsts), self._struct.k)
        fits = ids.shape == logits.shape == shape and ids.dtype is torch.int64
        if not fits or not ids.is_cpu or not logits.is_cpu:
            raise ValueError(
                f"expected ids and logits {list(shape)}, int64 and floating point on the CPU, got "
                f"{list(ids.shape)} {ids.dtype} and {list(logits.shape)} on {ids.device}"
            )
        if ids.stride(1) != 1 or logits.stride(1) != 1:
            ids, logits = ids.contiguous(), logits.contiguous()
        pairs = array("i", [0]) * (2 * len(firsts))
        pairs[::2], pairs[1::2] = array("i", firsts), array("i", scored.tokens)
        order, visited = array("i", scored.order), array("i", scored.visited)
        emitted = array("i", scored.emitted)
        assert len(visited) == len(emitted)
        lists = [own.buffer_info()[0] for own in (pairs, order, visited, emitted)]
        seen = SeenStruct(*lists, ids.data_ptr(), logits.data_ptr())
        seen.num, seen.num_visited, seen.write = len(firsts), len(visited), write
        seen.id_stride, seen.logit_stride = ids.stride(0), logits.stride(0)
        functions().table_learn(self._at, ctypes.byref(seen))
