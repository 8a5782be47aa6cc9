"""What of a call C code may do by itself: grow trees, choose tokens (`specdec.multi_step`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from specdec.call import Call
from specdec.drafters.native_drafter import has_native
from specdec.kernels.step_structs import JUDGED, LIKELIEST, SAMPLED, ChoosingStruct, NucleusStruct
from specdec.kernels.truncated_row import MOST_K
from specdec.random import RandomSource, SeededRandom
from specdec.row_text import Row
from specdec.trees.best_first import BestFirst
from specdec.trees.coupled_best_first import CoupledBestFirst
from specdec.trees.heap import HeapLimits
from specdec.types import Draw
from specdec.verifiers.coupled import Coupled
from specdec.verifiers.match import Match
from specdec.warpers import Truncation, truncation_of

if TYPE_CHECKING:
    from specdec.loop import Parts


class Limits(NamedTuple):
    """What a policy says of its trees.

    Attributes:
        heap: their size and the draw law of their nodes.
        coupled: of a policy that looks at the noise, which follows what was chosen; else None.
    """

    heap: HeapLimits
    coupled: CoupledBestFirst | None = None


NO_TREES = Limits(HeapLimits(0, 0, Draw.POINT))


def limits_of(call: Call, row: Row, parts: Parts) -> Limits | None:
    """Returns the limits of trees that C code may grow; None for trees that it cannot."""
    policy = parts.policy
    if not has_native(parts.drafter) or not isinstance(row.streams.draft, SeededRandom):
        return None
    # no subclass: what it changes would be left out
    if isinstance(policy, BestFirst) and type(policy) is BestFirst:
        return Limits(policy.limits)
    if isinstance(policy, CoupledBestFirst) and type(policy) is CoupledBestFirst:
        return Limits(policy.limits, None if call.greedy else policy)
    return None


def choosing_of(call: Call, row: Row, parts: Parts) -> ChoosingStruct:
    """Returns how C code chooses tokens: if nobody else is to be asked, as the rule would."""
    if call.greedy:
        likeliest = type(parts.verifier) in (Coupled, Match) and not row.processors
        return ChoosingStruct(way=LIKELIEST if likeliest and not _is_looked_at(row) else JUDGED)
    left = left_of(row) if may_sample(row, parts) else None
    return ChoosingStruct(way=JUDGED) if left is None else sampling(left, row.streams.verify)


def may_sample(row: Row, parts: Parts) -> bool:
    """Returns whether nobody but processors is to be asked about a row that samples."""
    # no subclass: what it changes would be left out
    known = type(parts.verifier) is Coupled and type(row.streams.verify) is SeededRandom
    return known and not _is_looked_at(row)


def left_of(row: Row) -> Truncation | None:
    """Returns what a row's processors leave as they are now; None where C code cannot tell."""
    left = truncation_of(row.processors)
    return None if left is None or left.top_k > MOST_K else left


def sampling(left: Truncation, random: RandomSource) -> ChoosingStruct:
    """Returns how C code chooses as `Coupled` does.

    Args:
        left: what the processors leave.
        random: whose noise is added.
    """
    seed, row = key_of(random)
    return ChoosingStruct(
        way=SAMPLED,
        temperature=left.temperature,
        k=left.top_k,
        nucleus=NucleusStruct(-1.0 if left.border is None else left.border, left.min_kept),
        seed=seed,
        row=row,
    )


def key_of(random: RandomSource) -> tuple[int, int]:
    """Returns what the noise of a production source is keyed by: seed and row."""
    assert isinstance(random, SeededRandom)
    return random.seed, random.row


def _is_looked_at(row: Row) -> bool:
    """Returns whether anybody wants to be told of every token, or of its scores."""
    return row.stopper.asks_others or row.keeps_scores or row.keeps_logits
