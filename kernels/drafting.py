"""The laws of drafters that learn from the text, and trees grown from them, in C.

A tree is some hundred small steps: looking rows up, ranking, a heap. In Python each takes a
microsecond or more; here a tree of 64 nodes takes some tens of them. What the C code does is said
by the Python classes beside it, in `specdec.drafters` and `specdec.trees`, which serve where there
is no compiler.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from specdec.kernels.native import library, why_not

_SOURCE = Path(__file__).with_name("drafting.c")
MOST_SOURCES = 3  # texts that a suffix law asks
MOST_MIXED = 8  # laws of a mixture
MOST_SUCCESSORS = 16  # of a ranking
NO_CHANCE = -1  # instead of a number of nodes
_KINDS = 3  # whose row a table's guess stands in

_POINTER, _INT, _LONG, _REAL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double


class MatchStruct(ctypes.Structure):
    """`struct match`."""

    _fields_ = (("state", _INT), ("length", _INT))


class SuccessorsStruct(ctypes.Structure):
    """`struct successors`."""

    _fields_ = (
        ("num", ctypes.c_int),
        ("tokens", _INT * (MOST_SUCCESSORS + 1)),
        ("counts", _INT * (MOST_SUCCESSORS + 1)),
        ("total", _LONG),
        ("latest", _INT),
    )


class TableStruct(ctypes.Structure):
    """`struct table`."""

    _fields_ = (
        *((name, _POINTER) for name in ("keys", "ages", "ids", "log_shares", "buckets")),
        *((name, _POINTER * _KINDS) for name in ("hits", "trials", "chances")),
        *((name, _LONG) for name in ("num_sets", "k")),
    )


class SeenStruct(ctypes.Structure):
    """`struct seen`."""

    _fields_ = (
        *((name, _POINTER) for name in ("pairs", "order", "visited", "emitted", "ids", "logits")),
        *((name, _LONG) for name in ("num", "num_visited", "id_stride", "logit_stride", "write")),
    )


class FoundStruct(ctypes.Structure):
    """`struct found`."""

    _fields_ = (("chance", _REAL), *((name, _INT) for name in ("token", "cell", "rank")))


class SourceStruct(ctypes.Structure):
    """`struct source`."""

    _fields_ = (("automaton", _POINTER), ("stored", _LONG))


class SuffixPartsStruct(ctypes.Structure):
    """`struct suffix_parts`."""

    _fields_ = (
        ("sources", SourceStruct * MOST_SOURCES),
        ("num_sources", _LONG),
        ("matches", MatchStruct * MOST_SOURCES),
        *((name, _POINTER) for name in ("share_buckets", "length_buckets")),
        ("num_lengths", _LONG),
        *((name, _POINTER) for name in ("hits", "trials", "chances", "common")),
        *((name, _LONG) for name in ("num_common", "max_contexts", "max_successors")),
    )


class TrustStruct(ctypes.Structure):
    """`struct trust`."""

    _fields_ = (("weights", _POINTER), ("outcomes", _POINTER))


class CouplingStruct(ctypes.Structure):
    """`struct coupling`."""

    _fields_ = (
        ("weights", _POINTER),
        ("seed", ctypes.c_uint64),
        *((name, _LONG) for name in ("row", "position")),
    )


class PlanStruct(ctypes.Structure):
    """`struct plan`."""

    _fields_ = (
        *((name, _LONG) for name in ("nodes", "depth", "max_branching")),
        ("least_chance", _REAL),
        ("noise", CouplingStruct),
    )


class TreeStruct(ctypes.Structure):
    """`struct tree`."""

    _fields_ = (
        ("count", _LONG),
        *((name, ctypes.POINTER(_INT)) for name in ("tokens", "parents", "handles")),
        ("chances", ctypes.POINTER(_REAL)),
    )


_FUNCTIONS: dict[str, tuple[object, ...]] = {  # what comes back, then the arguments
    "automaton_new": (_POINTER,),
    "automaton_end": (None, _POINTER),
    "automaton_size": (_LONG, _POINTER),
    "automaton_extend": (None, _POINTER, _POINTER, _LONG),
    "automaton_repeated": (MatchStruct, _POINTER),
    "automaton_follow": (MatchStruct, _POINTER, MatchStruct, _POINTER, _LONG),
    "automaton_shorter": (MatchStruct, _POINTER, _INT),
    "automaton_count": (_LONG, _POINTER, _INT),
    "automaton_successors": (None, _POINTER, _INT, _POINTER),
    "table_law": (_POINTER, _POINTER, _INT, _INT),
    "table_learn": (None, _POINTER, _POINTER),
    "suffix_law": (_POINTER, _POINTER),
    "suffix_commonest": (_LONG, _POINTER, _POINTER),
    "mixed_law": (_POINTER, _POINTER, _LONG, _POINTER),
    "law_end": (None, _POINTER),
    "law_extend": (_INT, _POINTER, _INT, _INT),
    "law_bound": (_REAL, _POINTER, _INT),
    "law_width": (_LONG, _POINTER, _POINTER, _LONG),
    "law_rows": (None, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER),
    "law_learn": (_LONG, _POINTER, _POINTER, _POINTER, _LONG),
    "law_learn_along": (None, _POINTER, _POINTER, _LONG),
    "law_grow": (ctypes.POINTER(TreeStruct), _POINTER, _POINTER, _INT),
    "law_fit": (_LONG, _POINTER, _POINTER, _POINTER, _LONG, _POINTER, _POINTER),
    "drafting_sizes": (None, _POINTER),
}


def serves() -> bool:
    """Returns whether the C code can be had here."""
    return why_not(_SOURCE) is None


@functools.cache
def functions() -> ctypes.PyDLL:
    """Returns the library, its functions declared.

    Raises:
        NativeError: if it cannot be had here.
    """
    # it keeps Python's lock, which takes less than giving it back and guards the tables
    own = ctypes.PyDLL(library(_SOURCE)._name)
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(own, name)
        function.restype, function.argtypes = result, arguments
    return own
