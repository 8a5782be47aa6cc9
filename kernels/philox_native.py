"""The words of Philox4x32-10 in one call of C: what keyed noise is made of on a CPU."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np

from specdec.kernels.native import library, why_not

_SOURCE = Path(__file__).with_name("philox.c")


def serves() -> bool:
    """Returns whether the C code can be had here."""
    return why_not(_SOURCE) is None


def words(seed: int, row: int, position: int, vocab_size: int, nonce: int) -> np.ndarray:
    """Does what `specdec.kernels.philox.keyed_words` says, ``[V]`` uint32."""
    made = np.empty(vocab_size, dtype=np.uint32)
    _library().philox_words(seed, position, row, nonce, vocab_size, made.ctypes.data)
    return made


def words_at(seed: int, row: int, position: int, tokens: np.ndarray, nonce: int) -> np.ndarray:
    """Returns the words of some tokens, ``[k]`` uint32.

    Args:
        seed: as `specdec.kernels.philox.keyed_gumbel` takes it; so are row, position and nonce.
        tokens: ``[k]`` int64, none negative.
    """
    tokens = np.ascontiguousarray(tokens)
    made = np.empty(len(tokens), dtype=np.uint32)
    _library().philox_words_at(
        seed, position, row, nonce, tokens.ctypes.data, len(tokens), made.ctypes.data
    )
    return made


def choice(seed: int, row: int, position: int, scores: np.ndarray) -> int:
    """Returns the place of the largest score with its noise, the first of several.

    Args:
        seed: as `specdec.kernels.philox.keyed_gumbel` takes it; so are the next two.
        row: number of the row.
        position: absolute position of the token.
        scores: ``[V]`` float32.

    Returns:
        -1 if the largest score is no finite number.
    """
    scores = np.ascontiguousarray(scores)
    place: int = _library().philox_choice(
        *(seed, position, row, 0, scores.ctypes.data, len(scores))
    )
    return place


@functools.cache
def _library() -> ctypes.CDLL:
    own = library(_SOURCE)
    key, word, size, pointer = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int64, ctypes.c_void_p
    own.philox_words.argtypes = [key, word, word, word, size, pointer]
    own.philox_words_at.argtypes = [key, word, word, word, pointer, size, pointer]
    own.philox_words.restype = own.philox_words_at.restype = None
    own.philox_choice.argtypes = [key, word, word, word, pointer, size]
    own.philox_choice.restype = size
    return own
