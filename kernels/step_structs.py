"""How C code reads what takes part in several steps: its structures, field by field."""

from __future__ import annotations

import ctypes

from specdec.kernels.drafting import MOST_MIXED, PlanStruct, TreeStruct, TrustStruct
from specdec.kernels.layer_structs import NodesStruct, PassStruct

MOST_NODES = 128  # of a tree, its root included
MOST_ENDS = 16  # tokens that end a text
MOST_STEPS = 32  # of a call
SUFFIXES, TABLE = 0, 1  # kinds of what a drafter asks
JUDGED, LIKELIEST, SAMPLED = 0, 1, 2  # ways of choosing

_POINTER, _INT, _LONG, _REAL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double


class TargetStruct(ctypes.Structure):
    """`struct target`."""

    _fields_ = (
        *((name, _POINTER) for name in ("give_lock", "take_lock")),
        *((name, _POINTER) for name in ("decoder", "layers", "ends", "keys", "values", "room")),
        ("shared", PassStruct),
        ("nodes", NodesStruct),
        *((name, _LONG) for name in ("num_layers", "heads", "width", "slots", "vocabulary")),
    )


class DraftingStruct(ctypes.Structure):
    """`struct drafting`."""

    _fields_ = (("kind", _LONG), ("parts", _POINTER), ("number", _LONG))


class DrafterStruct(ctypes.Structure):
    """`struct drafter`."""

    _fields_ = (
        ("sources", DraftingStruct * MOST_MIXED),
        ("num", _LONG),
        ("trust", ctypes.POINTER(TrustStruct)),
    )


class AllowanceStruct(ctypes.Structure):
    """`struct allowance`."""

    _fields_ = (
        ("plan", PlanStruct),
        ("squares", _POINTER),
        *((name, _LONG) for name in ("steps", "most", "least")),
        ("seconds", _POINTER),
        ("drafting", _REAL),
        *((name, _POINTER) for name in ("edges", "shares")),
        ("num_edges", _LONG),
        *((name, _REAL) for name in ("gain", "rate", "time")),
    )


class TextStruct(ctypes.Structure):
    """`struct text`."""

    _fields_ = (
        *((name, _INT) for name in ("before", "root")),
        *((name, _LONG) for name in ("position", "remaining")),
        ("ends", _INT * MOST_ENDS),
        ("num_ends", _LONG),
    )


class DoneStruct(ctypes.Structure):
    """`struct done`."""

    _fields_ = (
        *((name, _LONG) for name in ("nodes", "accepted", "emitted", "levels", "width")),
        *((name, _REAL) for name in ("expected", "drafting", "scoring")),
        *((name, _REAL) for name in ("processing", "choosing", "learning")),
    )


class NucleusStruct(ctypes.Structure):
    """`struct nucleus`."""

    _fields_ = (("border", ctypes.c_float), ("kept", _LONG))


class ChoosingStruct(ctypes.Structure):
    """`struct choosing`."""

    _fields_ = (
        ("way", _LONG),
        ("temperature", ctypes.c_float),
        ("k", _LONG),
        ("nucleus", NucleusStruct),
        ("seed", ctypes.c_uint64),
        ("row", _LONG),
        ("room", _POINTER),
    )


class RecordStruct(ctypes.Structure):
    """`struct record`."""

    _fields_ = (
        ("steps", ctypes.POINTER(DoneStruct)),
        ("rows", _LONG),
        *((name, _POINTER) for name in ("tokens", "parents", "paths", "emitted", "chances")),
        *((name, _POINTER) for name in ("logits", "top_logits", "top_ids")),
    )


class _LawsStruct(ctypes.Structure):
    """`struct laws`."""

    _fields_ = (("sources", _POINTER * MOST_MIXED), ("law", _POINTER))


class GoingStruct(ctypes.Structure):
    """`struct going`."""

    _fields_ = (
        ("target", ctypes.POINTER(TargetStruct)),
        ("drafter", ctypes.POINTER(DrafterStruct)),
        ("allowance", ctypes.POINTER(AllowanceStruct)),
        ("choosing", ctypes.POINTER(ChoosingStruct)),
        ("record", ctypes.POINTER(RecordStruct)),
        ("text", TextStruct),
        *((name, _LONG) for name in ("start", "waiting", "count", "row")),
        *((name, _REAL) for name in ("begun", "gain")),
        ("laws", _LawsStruct),
        ("tree", _POINTER),
        ("alone", TreeStruct),
        *((name, _INT) for name in ("no_parent", "no_handle")),
        ("no_chance", _REAL),
    )
