"""The verdicts of `coupled` about the trees of a step, in one call of C where C code may choose."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.call import Call
from specdec.kernels.step_structs import ChoosingStruct
from specdec.kernels.token_choice import RowTree, serves, walked
from specdec.native_rules import left_of, may_sample, sampling
from specdec.row_text import Row
from specdec.stats import DecodeStats
from specdec.trees.tree import DraftTree
from specdec.types import Verdict
from specdec.verifiers.coupled import Coupled
from specdec.warpers import temperature_among

if TYPE_CHECKING:
    from specdec.loop import Parts


class NativeVerdicts:
    """Decides about sampled rows whose processors only truncate; leaves all others to the verifier.

    Args:
        call: whose rows these are.
        parts: of the loop.
        stats: of the call; the time counts there.
    """

    def __init__(self, call: Call, parts: Parts, stats: DecodeStats) -> None:
        self._parts, self._stats = parts, stats
        self._may = not call.greedy and type(parts.verifier) is Coupled
        # by row, with the temperature that it was made for; None where C code may not choose
        self._made: dict[int, tuple[float | None, ChoosingStruct | None]] = {}

    def of(
        self, rows: Sequence[Row], trees: Sequence[DraftTree], logits: Sequence[Tensor]
    ) -> list[Verdict | None]:
        """Returns a verdict for each row; None where the verifier is to be asked.

        Args:
            rows: of the step.
            trees: that were scored.
            logits: ``[N, V]`` of each.
        """
        verdicts: list[Verdict | None] = [None] * len(rows)
        if not self._may:
            return verdicts
        fits = [own.is_cpu and own.dtype is torch.float32 for own in logits]
        if not any(fits) or not serves():
            return verdicts
        begin = time.perf_counter()
        places, choosing, walks = [], [], []
        for place, (row, tree, own) in enumerate(zip(rows, trees, logits, strict=True)):
            how = self._choosing(row) if fits[place] and own.is_contiguous() else None
            if how is not None:
                places.append(place)
                choosing.append(how)
                walks.append(RowTree(tree.token_list, tree.parent_list, own, row.root_position))
        processing = 0.0
        if walks:
            found, processing = walked(choosing, walks)
            for place, own_walk in zip(places, found, strict=True):
                if own_walk is not None:
                    verdicts[place] = Verdict(own_walk.path, own_walk.emitted[-1])
        self._stats.seconds["processors"] += processing
        self._stats.seconds["verify"] += time.perf_counter() - begin - processing
        return verdicts

    def _choosing(self, row: Row) -> ChoosingStruct | None:
        """Returns how C code chooses; anew where a processor was turned since the last step."""
        warper = temperature_among(row.processors)
        temperature = None if warper is None else warper.temperature
        made = self._made.get(row.index)
        if made is None or made[0] != temperature:
            left = left_of(row) if may_sample(row, self._parts) else None
            how = None if left is None else sampling(left, row.streams.verify)
            made = self._made[row.index] = temperature, how
        return made[1]
