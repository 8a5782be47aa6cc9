"""Laws that stand in C, and the trees that grow from them there."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from specdec.errors import LogitsError
from specdec.kernels.drafting import NO_CHANCE, CouplingStruct, PlanStruct, functions
from specdec.trees.tree import DraftTree
from specdec.types import Budget, Draw, Guesses, LawRows, Root

_POINT = int(Draw.POINT)


class KeyedNoise(NamedTuple):
    """What the chances of a tree's nodes are estimated by, beside the law.

    Attributes:
        seed: as `specdec.kernels.philox.keyed_gumbel` takes it.
        row: number of the row.
        weights: ``[4]`` float64, see `specdec.trees.coupled_best_first`.
    """

    seed: int
    row: int
    weights: np.ndarray


class NativeLaw:
    """A `ListedLaw` that C code looks up, extends and grows trees from, a call for a tree.

    Methods raise IndexError for a handle that the law has not issued.

    Args:
        pointer: of the law; freed with this object.
        parts: what the law points to: kept as long.
    """

    def __init__(self, pointer: int, *parts: object) -> None:
        self.pointer = pointer
        self._parts = parts
        self._end = functions().law_end

    def __del__(self) -> None:
        self._end(self.pointer)

    def __reduce__(self) -> str:
        raise TypeError("a law holds memory of C code; it can be neither copied nor saved")

    def extend(self, parent: int, token: int) -> int:
        """Returns a new handle for `parent` followed by `token`."""
        handle: int = functions().law_extend(self.pointer, parent, token)
        if handle < 0:
            raise _unknown([parent])
        return handle

    def bound(self, handle: int) -> float:
        """Returns what no chance among a handle's guesses exceeds."""
        bound: float = functions().law_bound(self.pointer, handle)
        if bound < 0:
            raise _unknown([handle])
        return bound

    def guesses(self, handle: int) -> Guesses:
        """Returns what may follow a handle."""
        ids, chances = self._listed([handle])
        return Guesses(ids[0].tolist(), chances[0].tolist())

    def rows(self, handles: Sequence[int]) -> LawRows:
        """Returns what may follow each handle, for policies that go level by level."""
        ids, chances = self._listed(handles)
        if not ids.shape[1]:
            ids, chances = np.full((len(ids), 1), -1, np.int32), np.zeros((len(ids), 1))
        with np.errstate(divide="ignore"):
            log_probs = np.log(chances).astype(np.float32)
        return LawRows(torch.from_numpy(log_probs), torch.from_numpy(ids.astype(np.int64)))

    def _listed(self, handles: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and chances ``[n, widest]`` of the guesses; padding is -1 and 0."""
        own, asked = functions(), array("i", handles)
        place, count = asked.buffer_info()
        width = own.law_width(self.pointer, place, count)
        if width < 0:
            raise _unknown(handles)
        ids, chances = np.empty((count, width), np.int32), np.empty((count, width))
        own.law_rows(self.pointer, place, count, width, ids.ctypes.data, chances.ctypes.data)
        return ids, chances

    def learn(self, handles: Sequence[int], tokens: Sequence[int]) -> None:
        """Counts that tokens came at the handles of a path; the shorter of both tells how many."""
        count = min(len(handles), len(tokens))
        at, came = array("i", handles), array("i", tokens)
        places = at.buffer_info()[0], came.buffer_info()[0]
        if functions().law_learn(self.pointer, *places, count):
            raise _unknown(handles)

    def learn_along(self, tokens: Sequence[int]) -> None:
        """Counts that tokens came, one behind the other, from the root on."""
        came = array("i", tokens)
        functions().law_learn_along(self.pointer, *came.buffer_info())

    def fit(
        self,
        handles: Sequence[int],
        tokens: Sequence[int],
        weights: np.ndarray,
        squares: np.ndarray,
    ) -> None:
        """Does what `CoupledBestFirst.observe` says, at handles whose guesses had been weighed.

        Args:
            handles: of a path.
            tokens: that the target chose there; the shorter of both tells how many.
            weights: ``[4]`` float64, written to.
            squares: ``[4]`` float64 of AdaGrad, written to.
        """
        count = min(len(handles), len(tokens))
        at, came = array("i", handles), array("i", tokens)
        places = at.buffer_info()[0], came.buffer_info()[0]
        tables = weights.ctypes.data, squares.ctypes.data
        if functions().law_fit(self.pointer, *places, count, *tables):
            raise _unknown(handles)

    def grow(
        self,
        root: Root,
        budget: Budget,
        *,
        max_branching: int,
        max_depth: int,
        draw: Draw,
        noise: KeyedNoise | None = None,
    ) -> DraftTree:
        """Returns the tree of `specdec.trees.heap.grow_by_heap`.

        Args:
            root: where the tree starts.
            budget: nodes, depth and the least chance of a path.
            max_branching: the most children of a node.
            max_depth: the deepest level, whatever the budget.
            draw: how the nodes came to be.
            noise: to weigh the law's chances by; None to take them as they are.

        Raises:
            LogitsError: if the law holds NaN, or a chance above one.
        """
        depth = min(budget.depth, max_depth)
        plan = PlanStruct(budget.nodes, depth, max_branching, budget.least_chance)
        if noise is not None:
            weights = noise.weights.ctypes.data
            plan.noise = CouplingStruct(weights, noise.seed, noise.row, root.position)
        made = functions().law_grow(self.pointer, ctypes.byref(plan), root.token).contents
        count = made.count
        if count == NO_CHANCE:
            raise LogitsError(
                f"the draft law gives token {made.tokens[0]} the chance {made.chances[0]}: "
                "drafters must guess with chances between 0 and 1"
            )
        return DraftTree(
            token_list=made.tokens[:count],
            parent_list=made.parents[:count],
            draw_list=[_POINT, *[int(draw)] * (count - 1)],
            q_row_list=[-1] * count,
            q=None,
            chance_list=made.chances[:count],
            handles=tuple(made.handles[:count]),
        )


def _unknown(handles: Sequence[int]) -> IndexError:
    return IndexError(f"the law has not issued all of the handles {list(handles)}")
