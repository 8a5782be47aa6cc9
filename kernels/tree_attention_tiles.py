"""Which tile of queries and keys a program takes, and into how many parts a prefix is split."""

from __future__ import annotations

from typing import NamedTuple

_TILES_PER_SPLIT = 4  # a part shorter than this costs more to merge than it saves


class Tile(NamedTuple):
    """Queries and keys of one program, and how it is compiled."""

    block_m: int  # rows: nodes x query heads of one KV head
    block_n: int  # slots a step
    block_t: int  # slots a step in the tree, where the bits take registers too
    num_warps: int
    num_stages: int  # steps of keys and values under way
    programs: int  # that one multiprocessor holds at a time


# For 16-bit inputs by padded width: (most rows it is meant for, tile). Chosen by registers, spills
# and shared memory as compiled for sm_90; speed was not measured. tests/test_kernel_compile.py
# compiles all of them.
_HALF: dict[int, tuple[tuple[int, Tile], ...]] = {
    64: (
        (16, Tile(16, 64, 32, 4, 3, 2)),
        (32, Tile(32, 64, 32, 4, 3, 2)),
        (64, Tile(64, 64, 32, 4, 3, 2)),
        (128, Tile(128, 64, 32, 8, 3, 1)),
    ),
    128: (
        (16, Tile(16, 64, 32, 4, 3, 2)),
        (32, Tile(32, 64, 32, 4, 3, 2)),
        (64, Tile(64, 64, 32, 4, 3, 2)),
        (128, Tile(128, 64, 32, 8, 3, 1)),
    ),
    256: (
        (16, Tile(16, 64, 32, 4, 2, 2)),
        (32, Tile(32, 32, 16, 4, 3, 2)),
        (64, Tile(64, 32, 16, 8, 3, 1)),
        (128, Tile(128, 32, 16, 8, 3, 1)),
    ),
}
WIDEST_HALF = max(_HALF)
# float32 multiplies without tensor cores: small tiles, for tests rather than for speed; none that
# was tried holds a head of 256 in registers
_SINGLE: dict[int, tuple[tuple[int, Tile], ...]] = {
    64: ((16, Tile(16, 32, 16, 4, 2, 2)),),
    128: ((16, Tile(16, 32, 16, 8, 2, 1)),),
}


def padded_width(width: int, itemsize: int) -> int:
    """Returns the power of two, 64 at least, in which a head of `width` numbers is computed.

    Raises:
        ValueError: if the head is wider than any tile for numbers of `itemsize` bytes.
    """
    table = _HALF if itemsize == 2 else _SINGLE
    for padded in table:
        if width <= padded:
            return padded
    raise ValueError(
        f"impl='triton' takes heads of up to {max(table)} numbers of {itemsize} bytes; got {width}"
    )


def choose_tile(num_rows: int, width: int, itemsize: int) -> Tile:
    """Returns the tile for `num_rows` = nodes x query heads of a KV head.

    Args:
        num_rows: at least 1; more than the largest tile are done in blocks of it.
        width: of `padded_width`.
        itemsize: bytes of a number, 2 or 4.
    """
    choices = (_HALF if itemsize == 2 else _SINGLE)[width]
    return next((tile for most, tile in choices if num_rows <= most), choices[-1][1])


def all_tiles(itemsize: int) -> list[tuple[int, Tile]]:
    """Returns every (padded width, tile) that `choose_tile` may return for an item size."""
    table = _HALF if itemsize == 2 else _SINGLE
    return [(width, tile) for width, choices in table.items() for _, tile in choices]


def count_splits(num_programs: int, num_slots: int, tile: Tile, num_multiprocessors: int) -> int:
    """Returns into how many parts the slots are split, at least 1.

    The smallest number that keeps the device 85 % as busy as the largest one would in a single wave
    (the rule of FlashAttention-3's hopper/heuristics.h): each part more is one more to merge. It
    depends on the room for slots, not on how many are filled, so that a captured graph stays right.

    Args:
        num_programs: programs of one part: row blocks x batch x KV heads.
        num_slots: slots that may be attended over.
        tile: of `choose_tile`.
        num_multiprocessors: of the device.
    """
    room = num_multiprocessors * tile.programs // num_programs
    most = min(room, -(-num_slots // (_TILES_PER_SPLIT * tile.block_n)))
    return max(1, -(-most * 85 // 100))
