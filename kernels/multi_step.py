"""Several steps of one row in one call: law and tree, pass, choices, learning, and again.

Behind a pass, which leaves nothing else in the caches, Python takes a tenth of what the pass took
for some microseconds of work. Where model and drafter stand in C already, C code can go from step
to step by itself. What it does in each is said by `specdec.loop`.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.kernels.decoder import Decoder, native_functions
from specdec.kernels.layer_parts import LayerCaches
from specdec.kernels.layer_structs import NodesStruct, PassStruct
from specdec.kernels.native import library, why_not
from specdec.kernels.step_structs import (
    MOST_ENDS,
    MOST_NODES,
    MOST_STEPS,
    AllowanceStruct,
    ChoosingStruct,
    DoneStruct,
    DrafterStruct,
    GoingStruct,
    RecordStruct,
    TargetStruct,
    TextStruct,
)

_SOURCE = Path(__file__).with_name("multi_step.c")
_GOES_ON = 1  # as `choose` returns it


class RowText(NamedTuple):
    """Where the text of a row stands.

    Attributes:
        before: the token before the last one; -1 for none.
        root: the last one.
        position: absolute position of the last one.
        remaining: tokens that fit behind it.
        ends: tokens that end the text, up to `MOST_ENDS`.
    """

    before: int
    root: int
    position: int
    remaining: int
    ends: Sequence[int]


class ScoredTree(NamedTuple):
    """A tree of N nodes, and what the target said of it.

    Attributes:
        tokens: of the nodes; this and the next as in `DraftTree`.
        parents: of the nodes.
        chances: of the nodes.
        rows: ``[R, V]`` float32 logits, of this tree and others.
        first: the row of the root; those of the other nodes follow.
    """

    tokens: list[int]
    parents: list[int]
    chances: list[float]
    rows: Tensor
    first: int

    @property
    def logits(self) -> Tensor:
        """``[N, V]`` of this tree; a view, made when it is asked for, as few are looked at."""
        return self.rows[self.first : self.first + len(self.tokens)]


class Judged(NamedTuple):
    """What was decided about a tree.

    Attributes:
        path: accepted nodes that became text, root left out.
        emitted: what became text, at least one token.
        goes_on: whether the text does.
    """

    path: Sequence[int]
    emitted: Sequence[int]
    goes_on: bool


class DoneStep(NamedTuple):
    """One of several steps.

    Attributes:
        scored: its tree.
        path: as in `Judged`.
        emitted: that too.
        levels: of the tree that was grown, before it was cut; -1 where no law was asked, as nothing
            could become text.
        width: draft nodes that were worth their time; one may be scored although it is not.
        expected: tokens that these were expected to give.
        drafting: seconds of growing and cutting.
        scoring: seconds of the pass.
        processing: seconds that C code took for temperature and truncations.
        choosing: seconds that it took for the choice beside them, also where it left it to others.
        learning: seconds of what came behind it.
    """

    scored: ScoredTree
    path: list[int]
    emitted: list[int]
    levels: int
    width: int
    expected: float
    drafting: float
    scoring: float
    processing: float
    choosing: float
    learning: float


class Ran(NamedTuple):
    """What several steps came to.

    Attributes:
        steps: those that were finished.
        error: raised behind them, by the judge or by an interrupt; None where there was none.
    """

    steps: list[DoneStep]
    error: BaseException | None


class RowDecoder:
    """A decoder, and the cache of the one row that it goes on with.

    Args:
        decoder: with a head.
        caches: of its layers; of one row.
        cos: ``[P, D]`` float32 by position, contiguous, P at least the slots of the caches.
        sin: as `cos`.
        top_k: likeliest tokens that are selected behind each node, 1 to `Decoder.most_selected`.
        most_nodes: of a tree, the root included, up to `MOST_NODES`.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: LayerCaches,
        cos: Tensor,
        sin: Tensor,
        *,
        top_k: int,
        most_nodes: int,
    ) -> None:
        _, heads, slots, width = caches.shape
        fits = caches.fit and caches.shape[0] == 1 and len(cos) >= slots and cos.dim() == 2
        if not fits or not 0 < top_k <= decoder.most_selected or most_nodes > MOST_NODES:
            raise ValueError(
                f"expected caches of one row, angles of its {slots} slots, 1 to "
                f"{decoder.most_selected} tokens a node and up to {MOST_NODES} nodes; got caches "
                f"{list(caches.shape)}, {len(cos)} angles, {top_k} tokens and {most_nodes} nodes"
            )
        self._kept = decoder, caches, cos, sin  # what the pointers point to
        row_stride, head_stride = caches.strides
        shared = PassStruct(
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            batch=1,
            nodes=most_nodes,
            visible=slots,
            row_stride=row_stride,
            head_stride=head_stride,
            threads=torch.get_num_threads(),
        )
        nodes = NodesStruct(tree=most_nodes, count=most_nodes, angles=len(cos), top_k=top_k)
        room, run = native_functions()
        self._room = torch.empty(room(decoder.layers.structs, shared, nodes), dtype=torch.float32)
        keys, values = (pointers.buffer_info()[0] for pointers in caches.pointers)
        self._ends = decoder.end_structs
        lock = ctypes.pythonapi
        self._struct = TargetStruct(
            give_lock=ctypes.cast(lock.PyEval_SaveThread, ctypes.c_void_p),
            take_lock=ctypes.cast(lock.PyEval_RestoreThread, ctypes.c_void_p),
            decoder=ctypes.cast(run, ctypes.c_void_p),
            layers=ctypes.addressof(decoder.layers.structs),
            ends=ctypes.addressof(self._ends),
            keys=keys,
            values=values,
            room=self._room.data_ptr(),
            shared=shared,
            nodes=nodes,
            num_layers=len(decoder.layers.layers),
            heads=heads,
            width=width,
            slots=slots,
            vocabulary=decoder.width,
        )
        rows = self._rows = most_nodes + 3 * MOST_STEPS
        # tokens, parents, paths, what was emitted; chances; logits and ids of the likeliest tokens
        self._lists = [array("i", bytes(4 * rows)) for _ in range(4)]
        self._chances = array("d", bytes(8 * rows))
        self._tops = array("f", bytes(4 * rows * top_k)), array("q", bytes(8 * rows * top_k))
        self._scores = torch.empty(decoder.width, dtype=torch.float32)
        self._done = (DoneStruct * MOST_STEPS)()
        lists = [own.buffer_info()[0] for own in self._lists]
        chances = self._chances.buffer_info()[0]
        top_logits, top_ids = self._tops
        tops = top_logits.buffer_info()[0], top_ids.buffer_info()[0]
        self._record = RecordStruct(self._done, rows, *lists, chances, None, *tops)

    def run(
        self,
        text: RowText,
        start: int,
        allowance: AllowanceStruct,
        drafter: DrafterStruct | None,
        choosing: ChoosingStruct,
        judge: Callable[[list[DoneStep], ScoredTree], Judged],
    ) -> Ran:
        """Runs steps, as many as the allowance says or fewer; returns what came of each.

        They stop at the end of the text, where drafts no longer pay, and before what an error is to
        tell of. The cache holds the root and the accepted nodes of each.

        Args:
            text: of the row.
            start: slot of its last token.
            allowance: what is grown and scored; up to `MOST_STEPS` steps.
            drafter: that guesses; None where the allowance has no nodes. It learns.
            choosing: how C code chooses tokens; its `room` is set here.
            judge: decides about a tree where C code may not or cannot, after it was told of the
                steps that C code decided about since the last one.
        """
        rows = min(self._rows, allowance.plan.nodes + 1 + 3 * allowance.steps)
        record, struct = self._record, self._struct
        # anew each time, as whoever keeps a step keeps them
        logits = torch.empty(rows, struct.vocabulary, dtype=torch.float32)
        record.rows, record.logits = rows, logits.data_ptr()
        ends = (ctypes.c_int32 * MOST_ENDS)(*text.ends)
        given = TextStruct(
            text.before, text.root, text.position, text.remaining, ends, len(text.ends)
        )
        choosing.room = self._scores.data_ptr()
        going = GoingStruct(
            ctypes.pointer(struct),
            None if drafter is None else ctypes.pointer(drafter),
            ctypes.pointer(allowance),
            ctypes.pointer(choosing),
            ctypes.pointer(record),
            given,
            start,
        )
        go_on, leave_out = _functions()
        error: BaseException | None = None
        told = told_rows = 0
        try:
            waits = go_on(going, _GOES_ON)
            while waits:
                nodes = self._done[going.count].nodes
                before = self._steps(self._done[told : going.count], told_rows, logits)
                (scored,) = self._scored([nodes], going.row, logits)
                judged = judge(before, scored)
                self._note(going.count, going.row, nodes, judged)
                told, told_rows = going.count + 1, going.row + nodes
                waits = go_on(going, int(judged.goes_on))
        except BaseException as raised:  # noqa: BLE001 (the caller raises it)
            error = raised
            leave_out(going)
        return Ran(self._steps(self._done[: going.count], 0, logits), error)

    def _steps(self, finished: Sequence[DoneStruct], row: int, logits: Tensor) -> list[DoneStep]:
        """Returns steps, of which the first one's nodes stand in the record from `row` on."""
        if not finished:
            return []
        _, _, paths, emitted = self._lists
        trees = self._scored([done.nodes for done in finished], row, logits)
        return [
            DoneStep(
                scored,
                paths[scored.first : scored.first + done.accepted].tolist(),
                emitted[scored.first : scored.first + done.emitted].tolist(),
                done.levels,
                done.width,
                done.expected,
                done.drafting,
                done.scoring,
                done.processing,
                done.choosing,
                done.learning,
            )
            for scored, done in zip(trees, finished, strict=True)
        ]

    def _scored(self, sizes: Sequence[int], row: int, logits: Tensor) -> list[ScoredTree]:
        """Returns trees of these sizes, which stand in the record from `row` on."""
        own = slice(row, row + sum(sizes))
        tokens, parents = (column[own].tolist() for column in self._lists[:2])
        chances = self._chances[own].tolist()
        trees, begin = [], 0
        for size in sizes:
            nodes = slice(begin, begin + size)
            trees.append(
                ScoredTree(tokens[nodes], parents[nodes], chances[nodes], logits, row + begin)
            )
            begin += size
        return trees

    def _note(self, step: int, row: int, nodes: int, judged: Judged) -> None:
        """Writes down what was decided about it."""
        path, emitted = judged.path, judged.emitted
        rises = all(low < high for low, high in pairwise((0, *path, nodes)))
        if not rises or not 0 < len(emitted) <= nodes:
            raise ValueError(
                f"expected a path of rising nodes below {nodes} and 1 to {nodes} tokens; got "
                f"{path} and {emitted}"
            )
        _, _, paths, tokens = self._lists
        paths[row : row + len(path)] = array("i", path)
        tokens[row : row + len(emitted)] = array("i", emitted)
        done = self._done[step]
        done.accepted, done.emitted = len(path), len(emitted)


def serves() -> bool:
    """Returns whether the C code can be had here."""
    return why_not(_SOURCE) is None


@functools.cache
def _functions() -> tuple[Any, Any]:
    """Returns `multi_step` and `multi_step_end`; they keep Python's lock but for the passes."""
    loaded: Any = ctypes.PyDLL(library(_SOURCE)._name)
    going = ctypes.POINTER(GoingStruct)
    loaded.multi_step.argtypes, loaded.multi_step.restype = [going, ctypes.c_int], ctypes.c_int
    loaded.multi_step_end.argtypes, loaded.multi_step_end.restype = [going], None
    return loaded.multi_step, loaded.multi_step_end


def structure_sizes() -> list[int]:
    """Returns what `step_structs` must agree with: bytes of structures, and limits."""
    sizes = (ctypes.c_int64 * 12)()
    library(_SOURCE).multi_step_sizes(sizes)
    return list(sizes)
