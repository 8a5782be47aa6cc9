"""Philox4x32-10, the counter-based generator behind keyed noise.

In plain torch integers, in numpy's for CPUs, and in C beside it (`specdec.kernels.philox_native`).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), Random123's
Philox4x32 with 10 rounds. Same bits on every device; Triton's tl.philox gives the same words.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.kernels import philox_native

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, ...]:
    """Returns the four 32-bit output words of every counter.

    Args:
        counter: four int64 tensors that broadcast together, each word in ``[0, 2**32)``.
        key: 64 bits; the low word is key 0.

    Returns:
        Four int64 tensors with values in ``[0, 2**32)``.
    """
    if all(word.device.type == "cpu" for word in counter):
        words = _philox_numpy([word.numpy().astype(np.uint64) for word in counter], key)
        return tuple(torch.from_numpy(np.asarray(word, dtype=np.int64)) for word in words)
    return philox_reference(counter, key)


def philox_reference(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int
) -> tuple[Tensor, ...]:
    """Returns what `philox_4x32` does, on any device."""
    word0, word1, word2, word3 = counter
    key0, key1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        # the signed product wraps, its bits do not: shift and mask still give the high word
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32).bitwise_and_(_MASK), (product1 >> 32).bitwise_and_(_MASK)
        word0, word2 = (high1 ^ word1).bitwise_xor_(key0), (high0 ^ word3).bitwise_xor_(key1)
        word1, word3 = product1.bitwise_and_(_MASK), product0.bitwise_and_(_MASK)
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return word0, word1, word2, word3


def _philox_numpy(counter: list[np.ndarray], key: int) -> tuple[np.ndarray, ...]:
    """The same on unsigned words of the CPU: half the operations, and cheaper ones."""
    word0, word1, word2, word3 = counter
    low, half = np.uint64(_MASK), np.uint64(32)
    key0, key1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        product0 = word0 * np.uint64(_MULTIPLIERS[0])
        product1 = word2 * np.uint64(_MULTIPLIERS[1])
        word0 = (product1 >> half) ^ (word1 ^ np.uint64(key0))
        word2 = (product0 >> half) ^ (word3 ^ np.uint64(key1))
        word1, word3 = product1 & low, product0 & low
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return word0, word1, word2, word3


def keyed_gumbel(
    seed: int, row: int, position: int, token_ids: Tensor, *, nonce: int = 0
) -> Tensor:
    """Returns standard Gumbel noise that depends on nothing but its key.

    One counter serves four neighbouring token ids: (token >> 2, position, row, nonce).

    Args:
        seed: 64-bit key.
        row: the row's number, which travels with the row.
        position: absolute position of the token to be chosen, padding left out.
        token_ids: ``[k]`` int64 ids to make noise for.
        nonce: raised when emitted text is discarded and drawn anew.

    Returns:
        ``[k]`` float64: the uniform has 32 bits, so that the winning tail is not starved, and
        the logarithms are taken in float64, so that dense and sparse calls agree.
    """

    if token_ids.device.type == "cpu" and philox_native.serves():
        made = philox_native.words_at(seed, row, position, token_ids.numpy(), nonce)
        return gumbel(torch.from_numpy(made.astype(np.int64)))
    return keyed_gumbel_reference(seed, row, position, token_ids, nonce=nonce)


def keyed_gumbel_reference(
    seed: int, row: int, position: int, token_ids: Tensor, *, nonce: int = 0
) -> Tensor:
    """Does what `keyed_gumbel` says, on any device."""

    def word(value: int) -> Tensor:
        return torch.tensor(value & _MASK, dtype=torch.int64, device=token_ids.device)

    words = philox_4x32((token_ids >> 2, word(position), word(row), word(nonce)), seed)
    return gumbel(torch.stack(words).gather(0, (token_ids & 3).unsqueeze(0)).squeeze(0))


def gumbel(bits: Tensor) -> Tensor:
    """Returns the noise that 32-bit words stand for, float64; a smaller word is larger noise."""
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def keyed_bits_dense(
    seed: int, row: int, position: int, vocab_size: int, device: torch.device, *, nonce: int = 0
) -> Tensor:
    """Returns the words whose `gumbel` is `keyed_gumbel` of the ids 0..V-1, ``[V]`` int64.

    All four lanes of a counter are used, a quarter of the work of asking id by id.
    """
    if device.type == "cpu":
        words = keyed_words(seed, row, position, vocab_size, nonce=nonce)
        return torch.from_numpy(words.astype(np.int64))
    blocks = torch.arange((vocab_size + 3) // 4, dtype=torch.int64, device=device)

    def word(value: int) -> Tensor:
        return torch.tensor(value & _MASK, dtype=torch.int64, device=device)

    lanes = philox_4x32((blocks, word(position), word(row), word(nonce)), seed)
    return torch.stack(lanes, dim=1).reshape(-1)[:vocab_size]


def keyed_words(
    seed: int, row: int, position: int, vocab_size: int, *, nonce: int = 0
) -> np.ndarray:
    """Returns what `keyed_bits_dense` does, ``[V]`` uint32 on the host."""
    if philox_native.serves():
        return philox_native.words(seed, row, position, vocab_size, nonce)
    return keyed_words_reference(seed, row, position, vocab_size, nonce=nonce)


def keyed_words_reference(
    seed: int, row: int, position: int, vocab_size: int, *, nonce: int = 0
) -> np.ndarray:
    """Does what `keyed_words` says, with numpy."""
    count = (vocab_size + 3) // 4
    counter = [np.arange(count, dtype=np.uint64)]
    counter += [np.array(value & _MASK, dtype=np.uint64) for value in (position, row, nonce)]
    words = np.empty((count, 4), dtype=np.uint32)
    for lane, word in enumerate(_philox_numpy(counter, seed)):
        words[:, lane] = word
    return words.reshape(-1)[:vocab_size]


def keyed_gumbel_dense(
    seed: int, row: int, position: int, vocab_size: int, device: torch.device, *, nonce: int = 0
) -> Tensor:
    """Returns `keyed_gumbel` for the ids 0..V-1, ``[V]`` float64."""
    return gumbel(keyed_bits_dense(seed, row, position, vocab_size, device, nonce=nonce))
