"""Several steps of a lone row in one call of C, where model and drafter stand in C.

What a step does is said by `specdec.loop`; texts are the same, and trees and tables but for what
automatic budgets learn: of some steps together, a few later.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from specdec.budget.base import Allowance
from specdec.call import Call
from specdec.drafters.native_drafter import NativeDrafter, has_native
from specdec.kernels.drafting import CouplingStruct, PlanStruct
from specdec.kernels.multi_step import DoneStep, Judged, RowText, ScoredTree
from specdec.kernels.step_structs import (
    MOST_ENDS,
    MOST_STEPS,
    AllowanceStruct,
    ChoosingStruct,
)
from specdec.native_rules import NO_TREES, Limits, choosing_of, key_of, limits_of
from specdec.row_text import Row, RowEnded, Scored, Step
from specdec.stats import DecodeStats
from specdec.target import TargetModel
from specdec.trees.tree import DraftTree
from specdec.types import Budget, DraftContext, Draw

if TYPE_CHECKING:
    from specdec.loop import Parts

# in which nothing is streamed
_SECONDS = 0.05
_FEWEST = 2  # steps for which it is worth its own preparation
_NO_LIMIT = 1 << 40
_PLAIN = Allowance(Budget(0, 0))
# has the verifier decide about a row's tree, and adds to the steps what became text
Verify = Callable[[Row, Scored, list[Step]], None]


class _Scored:
    """What a step scored; few are looked at, so the tree is made for who does."""

    __slots__ = ("_draw", "_lists", "_tree")

    def __init__(self, lists: ScoredTree, draw: Draw) -> None:
        self._lists, self._draw = lists, draw
        self._tree: DraftTree | None = None

    @property
    def tree(self) -> DraftTree:
        """The tree, always the same one."""
        if self._tree is None:
            tokens, parents, chances, *_ = self._lists
            draws = [int(Draw.POINT), *[int(self._draw)] * (len(tokens) - 1)]
            self._tree = DraftTree(tokens, parents, draws, [-1] * len(tokens), None, chances)
        return self._tree

    @property
    def logits(self) -> Tensor:
        """``[N, V]`` raw logits at its nodes."""
        return self._lists.logits


class MultiStep:
    """Runs steps of a row as long as nobody but the verifier wants to be asked in between.

    Args:
        parts: of the loop.
        target: with a cache of one row.
        stats: of the call.
        limits: of the trees; None where these are Python's.
        choosing: returns how C code chooses tokens; asked before each call of it, as whoever gave a
            processor may have turned it in between.
        verify: asked in the steps in which it cannot or may not.
    """

    def __init__(
        self,
        parts: Parts,
        target: TargetModel,
        stats: DecodeStats,
        limits: Limits | None,
        choosing: Callable[[], ChoosingStruct],
        verify: Verify,
    ) -> None:
        self._parts = parts
        self._target = target
        self._stats = stats
        self._limits = limits
        self._choosing = choosing
        self._verify = verify
        needs = parts.drafter.needs if parts.drafter is not None else None
        self._top_k = max(1, needs.node_top_k if needs is not None else 0)
        self._most_nodes = 1 + (parts.budget.max_nodes if parts.drafter is not None else 0)

    @classmethod
    def of(
        cls,
        call: Call,
        rows: Sequence[Row],
        parts: Parts,
        target: TargetModel,
        stats: DecodeStats,
        verify: Verify,
    ) -> MultiStep | None:
        """Returns what may run steps of a call; None where each must be asked for.

        It takes one row. Steps with a draft want best-first trees and a drafter that may stand in
        C; those of a pause may be left out by any drafter that misses some.
        """
        if len(rows) != 1 or len(rows[0].stopper.eos_token_ids) > MOST_ENDS:
            return None
        if rows[0].positions is not None:  # which angles or a table then follow
            return None
        drafter = parts.drafter
        if drafter is not None and drafter.needs.every_step:
            return None
        limits = limits_of(call, rows[0], parts)
        choosing = partial(choosing_of, call, rows[0], parts)
        return cls(parts, target, stats, limits, choosing, verify)

    def run(self, row: Row, steps: list[Step]) -> bool:
        """Runs some steps; returns False if the next one must be asked for.

        Args:
            row: of the call.
            steps: so far; those run are added, also before an error.
        """
        most = self._most_steps()
        if most < _FEWEST:
            return False
        with self._stats.timed("draft"):
            target = self._target.of_row(self._top_k, self._most_nodes)
            if target is None:
                return False
            start = self._target.lengths[0]
            ahead: Allowance | None = _PLAIN
            if self._parts.drafter is not None:
                drafts = self._limits is not None
                ahead = self._parts.budget.ahead(row.index, start, drafts=drafts)
            if ahead is None or ahead.steps == 0:
                return False
            drafter = self._drafter(row, ahead)
            if ahead.budget.nodes and drafter is None:
                self._limits = None  # a part of it is Python's
                return False
            allowance = self._allowance(row, ahead, min(most, ahead.steps or most))
            choosing = self._choosing()
            text, first = self._text(row), len(steps)
        judge = partial(self._judge, row, steps)
        begin, before = time.perf_counter(), sum(self._stats.seconds.values())
        struct = None if drafter is None else drafter.struct
        done, error = target.run(text, start, allowance, struct, choosing, judge)
        self._count(done)
        counted = sum(self._stats.seconds.values()) - before
        # what is around the steps: to make room for them, and to hand them over
        self._stats.seconds["draft"] += time.perf_counter() - begin - counted
        with self._stats.timed("verify"):
            came = len(steps) - first
            told = came - 1 in range(len(done))
            if not told or len(steps[-1].tokens) == len(done[came - 1].emitted):
                self._commit(row, done[came:], steps)  # nothing behind a step that was cut short
            self._learn(row, ahead, drafter, done, steps[first:])
        if error is not None:
            raise error
        return len(done) > 0

    def _most_steps(self) -> int:
        """Returns how many fit the time; that of one is not known before there was a step."""
        passes, seconds = self._stats.target_passes, self._stats.seconds
        if not passes:
            return 0
        mean = (sum(seconds.values()) - seconds["prefill"]) / passes
        return min(MOST_STEPS, int(_SECONDS / mean))

    def _drafter(self, row: Row, ahead: Allowance) -> NativeDrafter | None:
        own = self._parts.drafter
        if not ahead.budget.nodes or not has_native(own):
            return None
        return own.native(DraftContext(row.index, row.tokens, ahead.budget.depth + 1))

    def _text(self, row: Row) -> RowText:
        remaining = row.stopper.remaining(row.prefix.length)
        remaining = _NO_LIMIT if remaining is None else remaining
        before = row.tokens[-2] if len(row.tokens) > 1 else -1
        ends = tuple(row.stopper.eos_token_ids)
        return RowText(before, row.tokens[-1], row.root_position, remaining, ends)

    def _allowance(self, row: Row, ahead: Allowance, steps: int) -> AllowanceStruct:
        heap, coupled = self._limits or NO_TREES
        own, noise, squares = ahead.budget, CouplingStruct(), None
        if coupled is not None and own.nodes:
            noise.weights, squares = coupled.weights.ctypes.data, coupled.squares.ctypes.data
            noise.seed, noise.row = key_of(row.streams.draft)
        depth = min(own.depth, heap.max_depth)
        plan = PlanStruct(own.nodes, depth, heap.max_branching, own.least_chance, noise)
        reals = [
            array("d", numbers or ()) for numbers in (ahead.seconds, ahead.edges, ahead.shares)
        ]
        seconds, edges, shares = (numbers.buffer_info()[0] for numbers in reals)
        struct = AllowanceStruct(
            plan=plan,
            squares=squares,
            steps=steps,
            most=len(ahead.seconds or ()) - 1,
            least=ahead.least,
            seconds=seconds if ahead.seconds else None,
            drafting=ahead.drafting,
            edges=edges,
            shares=shares,
            num_edges=len(ahead.edges),
            gain=ahead.gain,
            rate=ahead.rate,
            time=_SECONDS,
        )
        struct.kept = reals  # what the pointers point to
        return struct

    def _scored(self, lists: ScoredTree) -> _Scored:
        heap, _ = self._limits or NO_TREES
        return _Scored(lists, heap.draw)

    def _count(self, done: Sequence[DoneStep]) -> None:
        seconds = self._stats.seconds
        for own in done:
            seconds["draft"] += own.drafting
            seconds["target"] += own.scoring
            seconds["processors"] += own.processing
            seconds["verify"] += own.choosing
            seconds["observe"] += own.learning
        self._stats.target_passes += len(done)

    def _judge(
        self, row: Row, steps: list[Step], chosen: Sequence[DoneStep], scored: ScoredTree
    ) -> Judged:
        """Has the verifier decide about a tree, behind the steps that C code decided about."""
        with self._stats.timed("verify"):
            self._commit(row, chosen, steps)
        before = len(steps)
        try:
            self._verify(row, self._scored(scored), steps)
        finally:
            for step in steps[before:]:
                row.stats.record(scored.parents, step.path, len(step.tokens))
        return Judged(steps[-1].path, steps[-1].tokens, not row.done)

    def _commit(self, row: Row, done: Sequence[DoneStep], steps: list[Step]) -> None:
        """Makes the tokens that C code chose text, up to its end."""
        for own in done:
            step = Step(row.index, [], [], self._scored(own.scored))
            try:
                with suppress(RowEnded):
                    row.commit(step, None, own.path, own.emitted)
            finally:
                if step.tokens:
                    step.path = step.path[: len(step.tokens)]
                    steps.append(step)
                    row.stats.record(own.scored.parents, step.path, len(step.tokens))
            if row.done:
                break

    def _learn(
        self,
        row: Row,
        ahead: Allowance,
        drafter: NativeDrafter | None,
        done: Sequence[DoneStep],
        steps: Sequence[Step],
    ) -> None:
        """Tells cache, budget and drafter what became text."""
        context = start = self._target.lengths[0]
        told: list[int] = []
        for own, step in zip(done, steps, strict=False):  # those behind the text's end are nothing
            if self._parts.drafter is not None:
                self._parts.budget.went(ahead, row.index, own, context)
            context += len(step.tokens)
            if own.levels >= 0:
                told += step.tokens
        self._target.cache.advance([context - start])
        if drafter is not None:
            drafter.came(told)
