"""Gumbel top-k with keyed noise: draws without replacement that depend on nothing but their key."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.implementations import resolve
from specdec.kernels.philox import keyed_gumbel_dense
from specdec.kernels.top_k_rows import MOST_OF_TRITON

IMPLEMENTATIONS = ("reference", "triton")


class GumbelTopK(NamedTuple):
    """What was drawn: tensors on the device of the log-probabilities."""

    ids: Tensor  # [N, k] int64, the largest score first; -1 past the support
    scores: Tensor  # [N, k] float64 log-probability plus noise; minus infinity past the support


def gumbel_top_k(
    log_probs: Tensor, noise_keys: Tensor, k: int, *, impl: str = "auto"
) -> GumbelTopK:
    """Returns the k entries of each row with the largest ``log_probs + g``.

    They are a draw of k tokens without replacement, in the order drawn, with the noise g of
    `specdec.kernels.philox.keyed_gumbel`, which the acceptance rule `coupled` adds to the target's
    log-probabilities: the first is what `keyed_argmax` chooses. The lowest id wins a tie, the sum
    is a float64. Unnormalised logits give the same draw, with scores shifted by their normaliser.

    A library function: the drafters that draw such trees work on the host.

    Source: Vieira, "Gumbel-max trick and weighted reservoir sampling" (2014); Kool et al.,
    "Stochastic beams and where to find them" (arXiv 1903.06059), section 2.3.

    Args:
        log_probs: ``[N, V]`` floating point, any strides; minus infinity is outside the support.
        noise_keys: ``[N, 4]`` int64: seed, row number, absolute position of the token to be drawn
            and nonce.
        k: 1 to V.
        impl: "reference"; "triton", for up to 32 bits and k up to 64; or "auto": "triton" on a GPU
            where it is installed and serves.

    Returns:
        `GumbelTopK`. A row that contains NaN has the ids -1 throughout; the caller raises.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit one another.
        ImportError: if "triton" is asked for and is not installed.
    """
    if log_probs.dim() != 2 or not log_probs.is_floating_point() or min(log_probs.shape) < 1:
        raise ValueError(
            "log_probs must be [N, V] floating point; got "
            f"{list(log_probs.shape)} {log_probs.dtype}"
        )
    rows, vocab_size = log_probs.shape
    wrong = noise_keys.shape != (rows, 4) or noise_keys.dtype != torch.int64
    if wrong or noise_keys.device != log_probs.device:
        raise ValueError(
            f"noise_keys must be {[rows, 4]} torch.int64 on {log_probs.device}; got "
            f"{list(noise_keys.shape)} {noise_keys.dtype} on {noise_keys.device}"
        )
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k must be 1 to V = {vocab_size}; got {k}")
    fast = log_probs.dtype != torch.float64 and k <= MOST_OF_TRITON  # which Triton's refuses else
    if resolve(impl, "gumbel_top_k", IMPLEMENTATIONS, log_probs, fast=fast) == "triton":
        from specdec.kernels.gumbel_top_k_triton import gumbel_top_k_triton as draw
    else:
        draw = gumbel_top_k_reference
    return GumbelTopK(*draw(log_probs, noise_keys, k))


def gumbel_top_k_reference(log_probs: Tensor, noise_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Does what `gumbel_top_k` says, a row at a time; the keys are read on the host."""
    rows, vocab_size = log_probs.shape
    ids = torch.full((rows, k), -1, dtype=torch.int64, device=log_probs.device)
    scores = torch.full((rows, k), -torch.inf, dtype=torch.float64, device=log_probs.device)
    for row, (seed, number, position, nonce) in enumerate(noise_keys.tolist()):
        own = log_probs[row].to(torch.float64)
        if bool(own.isnan().any()):
            continue
        own = own + keyed_gumbel_dense(
            seed, number, position, vocab_size, log_probs.device, nonce=nonce
        )
        best = own.sort(descending=True, stable=True)  # the lowest id first among equals
        drawn = best.values[:k] > -torch.inf
        ids[row] = torch.where(drawn, best.indices[:k], -1)
        scores[row] = best.values[:k]
    return ids, scores
