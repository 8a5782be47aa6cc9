"""Choices of sampled tokens in C: walks down the trees of several rows, shared out among threads.

Each token is that of `specdec.verifiers.coupled` behind temperature, top-k and nucleus, to the last
bit; where C code cannot be sure of it, others must choose.
"""

from __future__ import annotations

import ctypes
import functools
import time
from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.kernels.native import library, why_not
from specdec.kernels.step_structs import ChoosingStruct
from specdec.kernels.truncated_row import MOST_LEFT

_SOURCE = Path(__file__).with_suffix(".c")
_POINTER, _LONG, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class WalksStruct(ctypes.Structure):
    """`struct walks`."""

    _fields_ = (
        *((name, _POINTER) for name in ("choosing", "logits", "firsts", "positions")),
        *((name, _POINTER) for name in ("tokens", "parents", "paths", "emitted")),
        *((name, _POINTER) for name in ("accepted", "counts", "processing", "seconds", "rooms")),
        *((name, _LONG) for name in ("count", "width", "threads")),
    )


class RowTree(NamedTuple):
    """A row's tree of N nodes, and what the target said of it.

    Attributes:
        tokens: of the nodes; this and the next as in `DraftTree`.
        parents: of the nodes.
        logits: ``[N, V]`` float32 on the CPU, contiguous.
        position: absolute position of the root.
    """

    tokens: Sequence[int]
    parents: Sequence[int]
    logits: Tensor
    position: int


class Walked(NamedTuple):
    """Where the choices led.

    Attributes:
        path: accepted nodes, root left out.
        emitted: their tokens, and the one behind them.
    """

    path: list[int]
    emitted: list[int]


def serves() -> bool:
    """Returns whether the C code can be had here."""
    return why_not(_SOURCE) is None


def walked(
    choosing: Sequence[ChoosingStruct], trees: Sequence[RowTree]
) -> tuple[list[Walked | None], float]:
    """Walks down the trees of some rows, all of one vocabulary.

    Args:
        choosing: of each row, by noise.
        trees: of each row.

    Returns:
        Where each row's choices led, None where others must choose; and the seconds that passed
        while the threads were at the processors.
    """
    count, width, threads = len(trees), trees[0].logits.shape[1], torch.get_num_threads()
    # where scores of all tokens are made
    needs = any(not how.k and how.temperature != 1 for how in choosing)
    rooms = torch.empty(threads if needs else 0, width, dtype=torch.float32)
    firsts = array("q", accumulate((len(tree.tokens) for tree in trees), initial=0))
    given = (
        array("q", map(ctypes.addressof, choosing)),
        array("q", [tree.logits.data_ptr() for tree in trees]),
        firsts,
        array("q", [tree.position for tree in trees]),
        array("i", chain.from_iterable(tree.tokens for tree in trees)),
        array("i", chain.from_iterable(tree.parents for tree in trees)),
    )
    paths, emitted = (array("i", bytes(4 * firsts[-1])) for _ in range(2))
    accepted, counts = (array("q", bytes(8 * count)) for _ in range(2))
    processing, seconds = (array("d", bytes(8 * count)) for _ in range(2))
    made = paths, emitted, accepted, counts, processing, seconds
    pointers = [numbers.buffer_info()[0] for numbers in (*given, *made)]
    walks = WalksStruct(*pointers, rooms.data_ptr(), count, width, threads)
    begin = time.perf_counter()
    _functions().token_choice_walks(walks)
    took = time.perf_counter() - begin
    found: list[Walked | None] = []
    for first, own_path, own in zip(firsts, accepted, counts, strict=False):
        path, text = paths[first : first + own_path], emitted[first : first + own]
        found.append(Walked(path.tolist(), text.tolist()) if own > 0 else None)
    return found, took * sum(processing) / max(sum(seconds), 1e-9)


def sampled_token(choosing: ChoosingStruct, logits: Tensor, position: int) -> int | None:
    """Returns what C code chooses at a node, None where others must.

    Args:
        choosing: by noise.
        logits: ``[V]`` float32, contiguous.
        position: absolute position of the token.
    """
    room = torch.empty_like(logits)
    choosing.room = room.data_ptr()
    token: int = _functions().token_choice(choosing, logits.data_ptr(), len(logits), position)
    return None if token < 0 else token


def left_tokens(choosing: ChoosingStruct, logits: Tensor) -> list[int] | None:
    """Returns the tokens that a truncation leaves, rising, None where others must tell.

    Args:
        choosing: with top-k or a nucleus.
        logits: ``[V]`` float32, contiguous.
    """
    room, ids = torch.empty_like(logits), (_LONG * MOST_LEFT)()
    choosing.room = room.data_ptr()
    count = _functions().token_choice_left(choosing, logits.data_ptr(), len(logits), ids)
    return None if count < 0 else ids[:count]


def structure_sizes() -> list[int]:
    """Returns the bytes of C's `struct walks` and `struct choosing`."""
    sizes = (_LONG * 2)()
    _functions().token_choice_sizes(sizes)
    return list(sizes)


@functools.cache
def _functions() -> Any:
    own = library(_SOURCE)
    choosing, walks = ctypes.POINTER(ChoosingStruct), ctypes.POINTER(WalksStruct)
    own.token_choice_walks.argtypes, own.token_choice_walks.restype = [walks], None
    own.token_choice.argtypes = [choosing, _POINTER, _LONG, _LONG]
    own.token_choice_left.argtypes = [choosing, _POINTER, _LONG, _POINTER]
    own.token_choice.restype = own.token_choice_left.restype = _LONG
    return own
